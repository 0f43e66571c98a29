#!/bin/sh
# Print a Python 3.12 that can make virtual environments; exit 1 with one line of advice if there is none.
for candidate in "${PYTHON312:-}" python3.12 python3 python "$HOME"/.pyenv/versions/3.12*/bin/python3.12; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        command -v "$candidate"
        exit 0
    fi
done
echo "No Python 3.12 found: install it (apt install python3.12-venv, brew install python@3.12, pyenv install 3.12) or name it with PYTHON312=/path/to/python3.12." >&2
exit 1
