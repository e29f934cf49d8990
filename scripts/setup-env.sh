# Sourced by the other scripts, with the project's root as working directory:
# finds or installs the Debian packages and the Python environment that they need.
#
#   require_packages base [test]   the Debian packages of these groups
#   require_venv [test|plot]       .venv with the pinned versions and the package itself, editable
#
# Both return at once when everything is there. Progress goes to standard error.

# Administrators' tools live outside an ordinary user's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() {
    printf '%s\n' "$*" >&2
}

die() {
    say "$0: $*"
    exit 1
}

# Print the first Python that is 3.11 or newer and can make environments (ensurepip) and build extensions (Python.h).
find_python() {
    for candidate in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        path=$(command -v "$candidate") || continue
        "$path" - 2>/dev/null <<'EOF' || continue
import ensurepip, os, sys, sysconfig, venv
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(sys.version_info < (3, 11) or not os.path.exists(header))
EOF
        printf '%s\n' "$path"
        return 0
    done
    return 1
}

# Print the Debian package $2 unless the command $1 exists.
package_of() {
    command -v "$1" >/dev/null || printf '%s\n' "$2"
}

missing_packages() {
    for group in "$@"; do
        case $group in
        base)
            find_python >/dev/null || printf '%s\n' python3 python3-venv python3-dev
            package_of gcc gcc
            [ -e /usr/include/stdio.h ] || printf '%s\n' libc6-dev
            package_of pkg-config pkg-config
            pkg-config --exists fuse3 2>/dev/null || printf '%s\n' libfuse3-dev
            package_of fusermount3 fuse3
            package_of fio fio
            ;;
        test)
            package_of getfattr attr
            package_of setfacl acl
            package_of rsync rsync
            package_of sqlite3 sqlite3
            package_of git git
            package_of make make
            package_of valgrind valgrind
            package_of ip iproute2
            package_of iperf3 iperf3
            package_of mkfs.xfs xfsprogs
            package_of mkfs.ext4 e2fsprogs
            ;;
        esac
    done
}

require_packages() {
    missing=$(missing_packages "$@" | paste -sd " " -)
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        die "these Debian packages are missing; as root: apt-get install $missing"
    fi
    say "installing Debian packages: $missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2 || die "apt-get update failed"
    # shellcheck disable=SC2086  # a list of words
    apt-get install -y -qq --no-install-recommends $missing >&2 </dev/null || die "apt-get could not install: $missing"
    missing=$(missing_packages "$@" | paste -sd " " -)
    [ -z "$missing" ] || die "still missing after their installation: $missing"
}

# Tell whether a library of ours was built for the environment's Python: $1 is the module that knows it as $2.
built() {
    .venv/bin/python -c "import sys, $1; sys.exit($1.$2.find() is None)"
}

# The stamp's first line is where the environment stands (its scripts hold absolute paths), the second what is in it.
require_venv() {
    extras=${1:-}
    wanted=$(cat setup.cfg setup.py pyproject.toml constraints.txt benchfs_fuse/*/*.c | sha256sum | cut -d ' ' -f 1)
    for enough in test ${extras:-plot run}; do # test has all that plot has
        if [ "$(cat ".venv/stamp-$enough" 2>/dev/null)" = "$PWD
$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
            return 0
        fi
    done

    python=$(find_python) || die "no Python 3.11 or newer with venv and headers"
    if ! .venv/bin/python -c '' 2>/dev/null || [ "$(head -qn 1 .venv/stamp-* 2>/dev/null | sort -u)" != "$PWD" ]; then
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv >&2
    fi
    rm -f .venv/stamp-*
    say "installing Python packages (pinned in constraints.txt)"
    # A path in a .pth file, not setuptools' finder of modules, which would take each start of Python twice as long.
    # As environment variables the constraints reach the isolated environments of source builds too.
    PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
        .venv/bin/python -m pip install -qq --config-settings editable_mode=compat \
        --editable ".${extras:+[$extras]}" >&2 </dev/null ||
        die "pip could not install the package and its dependencies"
    built benchfs_fuse.companion LIBRARY ||
        say "the companion library could not be built; docs/companion.md says what is missing without it"
    built benchfs_fuse.rpc.wire COMPILED ||
        say "the compiled wire could not be built: small requests will take half as long again"
    printf '%s\n%s\n' "$PWD" "$wanted" >".venv/stamp-${extras:-run}"
}
