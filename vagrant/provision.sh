#!/usr/bin/env bash
# In the guest, as its user: installs Sidecar from the checkout, as a person would.
set -euo pipefail
cd ~/sidecar
[ ! -d /var/cache/wheelhouse ] || export SIDECAR_WHEELHOUSE=/var/cache/wheelhouse
scripts/setup --quickstart
.venv/bin/sidecar --version
