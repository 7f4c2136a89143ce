# Sourced by the scripts: messages, and becoming root.
# shellcheck shell=bash

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

die() { # STATUS MESSAGE [HINT]
  printf '%s: error: %s\n' "$(basename "$0")" "$2" >&2
  [ -z "${3:-}" ] || printf '  hint: %s\n' "$3" >&2
  exit "$1"
}

# Runs the script again as root with the same arguments, unless it is root already. What the scripts read from the
# environment is handed on by name; sudo drops the rest.
as_root() {
  [ "$(id -u)" -ne 0 ] || return 0
  command -v sudo > /dev/null || die 3 "needs root, and there is no sudo" "run it as root: su -c '$0 $*'"
  exec sudo -- env ${CI:+CI="$CI"} ${SIDECAR_WHEELHOUSE:+SIDECAR_WHEELHOUSE="$SIDECAR_WHEELHOUSE"} \
    ${SIDECAR_CACHE:+SIDECAR_CACHE="$SIDECAR_CACHE"} ${NO_COLOR:+NO_COLOR="$NO_COLOR"} "$(readlink -f "$0")" "$@"
}

# Runs a command and shows its output only when it fails.
quietly() {
  local log status=0
  log=$(mktemp)
  "$@" > "$log" 2>&1 < /dev/null || status=$?
  if [ "$status" -ne 0 ]; then
    tail -n 40 "$log" >&2
    say "failed ($status): $*"
  fi
  rm -f "$log"
  return "$status"
}
