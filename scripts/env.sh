# Sourced by quickstart and test. Sets $root (the project) and $python (an interpreter with everything installed).
set -euo pipefail

root="$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "$*" >&2
  exit 1
}

# Prints the version of interpreter $1 as "3.12"; fails where there is none that runs.
version_of() {
  command -v -- "$1" >/dev/null 2>&1 && "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

new_enough() {
  [[ "$1" =~ ^([0-9]+)\.([0-9]+)$ ]] && ((BASH_REMATCH[1] > 3 || (BASH_REMATCH[1] == 3 && BASH_REMATCH[2] >= 11)))
}

# Sets $base to the first Python >= 3.11. One that was asked for by name is taken or refused, never replaced.
find_python() {
  local candidate version found="" candidates=(python3 python3.13 python3.12 python3.11)
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    version="$(version_of "$candidate")" || continue
    if new_enough "$version"; then
      base="$candidate"
      return
    fi
    found="${found:+$found, }Python $version ($candidate)"
  done
  fail "Python 3.11 or newer is needed and ${found:-no Python} was found: install one, or name one with PYTHON=/path/to/python3."
}

# Sets $environment and $python: the active virtual environment, else .venv in the project, made where it is missing.
find_environment() {
  local version
  if [[ -n "${VIRTUAL_ENV:-}" ]]; then
    environment="$VIRTUAL_ENV" python="$VIRTUAL_ENV/bin/python"
    version="$(version_of "$python")" || fail "The active virtual environment $VIRTUAL_ENV has no working Python: deactivate it."
    new_enough "$version" || fail "Python 3.11 or newer is needed and the active virtual environment has $version: deactivate it."
    return
  fi
  environment="$root/.venv" python="$root/.venv/bin/python"
  # pip comes last when an environment is made: without it the making was interrupted.
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    find_python
    "$base" -m venv --clear "$environment" || fail "$base could not make the virtual environment $environment."
  fi
}

# Installs what is pinned, unless this environment already holds it for this project.
install() {
  local stamp="$environment/.hf_cwd_installed" wanted torch started=$SECONDS
  wanted="$(cat -- "$root/setup.py" "$root/constraints.txt" | cksum) $root"
  if [[ -f "$stamp" && "$(cat -- "$stamp")" == "$wanted" ]]; then
    echo "Already installed in $environment."
    return
  fi
  echo "Installing into $environment (a few minutes the first time) ..."
  torch="$(grep '^torch==' "$root/constraints.txt")"
  rm -f -- "$stamp"
  # From the project's directory, so that no path with spaces meets pip's parser; torch first and alone: see constraints.txt.
  (
    cd -- "$root" &&
      "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$torch" &&
      "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[scripts,test]'
  ) || fail "The installation failed, see the message above; run the same command again to go on."
  echo "$wanted" >"$stamp"
  echo "Installed in $((SECONDS - started)) s."
}

find_environment
install
