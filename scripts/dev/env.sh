# Sourced by quickstart, test, launch_local and gpu_check. Sets $root, the project; the rest is functions, for a script
# reads its arguments before it calls set_up, which installs.
set -euo pipefail

root="$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)"

# A mistake of the caller's ends a script with one line and 2; what fails on the way ends it with 1.
refuse() {
  echo "${0##*/}: error: $*" >&2
  exit 2
}

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

# Sets $environment and $python: the active virtual environment, else .venv in the project, which may not be there yet.
find_environment() {
  local version
  environment="${VIRTUAL_ENV:-$root/.venv}"
  python="$environment/bin/python"
  [[ -n "${VIRTUAL_ENV:-}" ]] || return 0
  version="$(version_of "$python")" || fail "The active virtual environment $environment has no working Python: deactivate it."
  new_enough "$version" || fail "Python 3.11 or newer is needed and the active virtual environment has $version: deactivate it."
}

# The directory that hf_cwd was installed from in this environment; nothing where it is not there, or from an index.
installed_from() {
  "$python" -I -c '
import importlib.metadata, json, urllib.parse
try:
    source = json.loads(importlib.metadata.distribution("hf_cwd").read_text("direct_url.json") or "{}")
except importlib.metadata.PackageNotFoundError:
    source = {}
if source.get("url", "").startswith("file:"):
    print(urllib.parse.unquote(urllib.parse.urlsplit(source["url"]).path))' 2>/dev/null
}

# Whether the environment is the project's own: .venv itself, and no link to that of another project.
is_own() {
  [[ "$(cd -P -- "$environment" 2>/dev/null && pwd)" == "$(cd -P -- "$root" && pwd)/.venv" ]] || [[ ! -e "$environment" ]]
}

# Refuses to install into an environment that was not made here, unless HF_CWD_INSTALL=yes allows it, or did before; and,
# also then, into one in which another clone is installed.
check_environment() {
  local other
  is_own && return
  other="$(installed_from)" || true
  if [[ -d "$other" && ! "$other" -ef "$root" ]]; then
    refuse "$environment has hf_cwd installed from $other, and would no longer see it: deactivate that environment, or uninstall hf_cwd there first ($python -m pip uninstall hf_cwd)."
  fi
  [[ "${HF_CWD_INSTALL:-}" == yes || "$1" == *" $root" ]] ||
    refuse "this would install $torch and -e '$root[scripts,test]' with constraints.txt into $environment, which was not made here: allow it by HF_CWD_INSTALL=yes, or deactivate that environment, and $root/.venv is made."
}

# Makes the environment where it is missing, and installs what is pinned unless it already holds it for this project.
set_up() {
  local stamp wanted torch found="" started=$SECONDS
  find_environment
  stamp="$environment/.hf_cwd_installed"
  wanted="$(cat -- "$root/setup.py" "$root/constraints.txt" | cksum) $root"
  [[ ! -f "$stamp" ]] || found="$(cat -- "$stamp")"
  if [[ "$found" == "$wanted" && "$(installed_from)" -ef "$root" ]]; then
    echo "Already installed in $environment."
    return
  fi
  torch="$(grep '^torch==' "$root/constraints.txt")"
  check_environment "$found"
  # pip comes last when an environment is made: without it the making was interrupted.
  if [[ -z "${VIRTUAL_ENV:-}" ]] && ! "$python" -m pip --version >/dev/null 2>&1; then
    find_python
    "$base" -m venv --clear "$environment" || fail "$base could not make the virtual environment $environment."
  fi
  echo "Installing into $environment (a few minutes the first time) ..."
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
