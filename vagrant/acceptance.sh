#!/usr/bin/env bash
# In the guest: the README's first command does what it says on a stock kernel, and leaves nothing in the kernel.
set -euo pipefail
cd ~/sidecar
echo "guest: $(uname -r), $(. /etc/os-release && echo "$PRETTY_NAME"), Python $(/usr/bin/python3 -V | cut -d' ' -f2)"
package=$(dpkg-query -S "/boot/vmlinuz-$(uname -r)" | cut -d: -f1)
[ -n "$package" ] || { echo "not a stock kernel" >&2; exit 1; }
before=$(sudo nft list tables)
[ ! -d /var/cache/wheelhouse ] || export SIDECAR_WHEELHOUSE=/var/cache/wheelhouse
./scripts/quickstart --no-page
[ "$(sudo nft list tables)" = "$before" ] || { echo "nft tables are left behind" >&2; sudo nft list tables >&2; exit 1; }
[ "$(sudo ip netns list | wc -l)" -eq 0 ] || { echo "network namespaces are left behind" >&2; exit 1; }
[ "$(sudo .venv/bin/sidecar down)" = "nothing to remove" ] || { echo "kernel traces are left behind" >&2; exit 1; }
echo "acceptance: passed"
