#!/usr/bin/env bash
# Pins every package that pyproject.toml and its extras need, to the newest that their ranges admit: one version for every
# Python and platform wherever there is one. Needs uv (`pip install uv`), which reads what packages need and installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV_CUSTOM_COMPILE_COMMAND=scripts/renew_constraints.sh uv pip compile pyproject.toml --quiet --upgrade --all-extras \
    --universal --python-version 3.11 --fork-strategy fewest --no-annotate --output-file constraints.txt
