#!/usr/bin/env bash
# Install Chromium and its driver from the system's packages where that is allowed, or say what to install.
set -euo pipefail

present() {
    { type -P chromium || type -P chromium-browser || type -P google-chrome; } >/dev/null && type -P chromedriver >/dev/null
}

present && exit 0
sudo=
if [ "$(id -u)" != 0 ]; then
    sudo="sudo -n"
fi
if type -P apt-get >/dev/null && { [ -z "$sudo" ] || $sudo true 2>/dev/null; }; then
    echo "installing chromium and chromium-driver"
    $sudo apt-get -qq update
    DEBIAN_FRONTEND=noninteractive $sudo apt-get -qq install --no-install-recommends -y chromium chromium-driver >/dev/null
fi
if ! present; then
    echo "error: the browser test needs Chromium and chromedriver. Install them, on Debian with: apt install chromium chromium-driver" >&2
    exit 1
fi
