# Sourced by the scripts: messages, and becoming root.
# shellcheck shell=bash

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

die() { # STATUS MESSAGE [HINT]
  printf '%s: error: %s\n' "$(basename "$0")" "$2" >&2
  [ -z "${3:-}" ] || printf '  hint: %s\n' "$3" >&2
  exit "$1"
}

# Runs this script once more with these arguments, as root. What the scripts read from the environment is handed on by
# name; sudo drops the rest.
run_as_root() {
  if ! command -v sudo > /dev/null; then
    local words
    words=$(printf '%q ' "$0" "$@")
    words=${words% }
    die 3 "needs root, and there is no sudo" "run it as root: su -c ${words@Q}"
  fi
  sudo -- env ${CI:+CI="$CI"} ${SIDECAR_CACHE:+SIDECAR_CACHE="$SIDECAR_CACHE"} ${NO_COLOR:+NO_COLOR="$NO_COLOR"} \
    "$(readlink -f "$0")" "$@"
}

# Goes on as root: where this is not root, runs the script again and ends with its status.
as_root() {
  [ "$(id -u)" -ne 0 ] || return 0
  run_as_root "$@"
  exit
}

# Runs a command and shows its output only when it fails.
quietly() {
  local log status=0
  log=$(mktemp)
  "$@" > "$log" 2>&1 < /dev/null 9>&- || status=$?
  if [ "$status" -ne 0 ]; then
    tail -n 40 "$log" >&2
    say "failed ($status): $*"
  fi
  rm -f "$log"
  return "$status"
}
