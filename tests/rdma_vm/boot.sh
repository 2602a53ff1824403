#!/bin/bash
# boot.sh DIR SCRIPT [QEMU OPTION...]: boots the machine that prepare.sh made in DIR and runs SCRIPT in it as root.
#
# The guest sees this machine's files at the same paths; what it writes is lost. Emulated in software always: a KVM that
# opens is not always one that works. From the environment: NODE (0), MEMORY in MiB (1536), CPUS (2), SECONDS_MAX (240).
# The console goes to standard output. Exit status: SCRIPT's; 97, 98: the guest's file system; 99: no report at all.
set -uo pipefail
dir=$(cd "$1" && pwd)
script=$(realpath "$2")
shift 2
launch=$(mktemp "${TMPDIR:-/tmp}/guest.XXXXXX")
console=$(mktemp)
trap 'rm -f "$launch" "$console"' EXIT
# The guest starts with an empty environment: what SCRIPT needs of ours travels in the launcher.
{
  for name in PYTHON PYTHONPATH RESULTS; do printf 'export %s=%q\n' "$name" "${!name:-}"; done
  printf 'cd %q\nexec /bin/bash %q\n' "$PWD" "$script"
} > "$launch"
# --foreground: in our own process group, so that who started us can end all of it.
timeout --foreground -k 5 "${SECONDS_MAX:-240}" qemu-system-x86_64 \
  -accel tcg,thread=multi -cpu max -smp "${CPUS:-2}" -m "${MEMORY:-1536}" \
  -nodefaults -no-user-config -no-reboot -display none -serial stdio \
  -kernel "$dir"/root/boot/vmlinuz-* -initrd "$dir/initramfs" \
  -append "console=ttyS0 quiet panic=-1 mitigations=off audit=0 random.trust_cpu=on run=$launch node=${NODE:-0}" \
  -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \
  -device virtio-9p-pci,fsdev=host,mount_tag=host \
  "$@" < /dev/null 2>&1 | sed -u 's,\r,,g' | tee "$console"
status=$(sed -n 's/^STATUS=\([0-9]*\)$/\1/p' "$console" | tail -n 1)
exit "${status:-99}"
