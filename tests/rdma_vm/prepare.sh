#!/bin/bash
# prepare.sh [DIR]: makes DIR ready to boot a small Linux with Soft-RoCE (rdma_rxe). Once; again it takes seconds.
#
# Debian packages that are missing are installed (by root, after an apt-get update). The kernel is Debian's full one: the
# cloud kernel has no rdma_rxe. It is unpacked, never installed. DIR needs 250 MB; default: ~/.cache/vllm-loraserve/vm.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/vllm-loraserve/vm}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
export PATH=$PATH:/usr/sbin:/sbin

wanted=(qemu-system-x86 busybox-static kmod cpio zstd iproute2 ibverbs-providers ibverbs-utils perftest python3-pyverbs)
absent=()
for package in "${wanted[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || absent+=("$package")
done
latest_kernel() { apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p' | head -n 1; }
if { [ ${#absent[@]} -gt 0 ] || [ -z "$(latest_kernel)" ]; } && [ "$(id -u)" = 0 ]; then
  apt-get update -qq
fi
if [ ${#absent[@]} -gt 0 ]; then
  echo "prepare: installing ${absent[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${absent[@]}" >/dev/null
fi

kernel=$(latest_kernel)
if [ -z "$kernel" ]; then
  echo "prepare: apt knows no linux-image-amd64; run apt-get update first" >&2
  exit 1
fi

if [ "$(cat "$dir/unpacked" 2>/dev/null || true)" != "$kernel" ]; then
  echo "prepare: unpacking $kernel"
  rm -rf "$dir/root" "$dir/unpacked"
  mkdir "$dir/root"
  download=$(mktemp -d "$dir/download.XXXXXX")
  trap 'rm -rf "$download"' EXIT
  (cd "$download" && apt-get download -qq "$kernel")
  # Only what the guest can need: the image, the indexes, and the modules of these parts of the tree.
  dpkg-deb --fsys-tarfile "$download/$kernel"_*.deb | tar -x -C "$dir/root" --wildcards \
    './boot/vmlinuz-*' './lib/modules/*/modules.*' \
    './lib/modules/*/kernel/drivers/infiniband/*' './lib/modules/*/kernel/drivers/virtio/*' \
    './lib/modules/*/kernel/drivers/net/*.ko' './lib/modules/*/kernel/drivers/char/*' './lib/modules/*/kernel/net/*' \
    './lib/modules/*/kernel/fs/*' './lib/modules/*/kernel/crypto/*' './lib/modules/*/kernel/arch/x86/crypto/*' \
    './lib/modules/*/kernel/lib/*'
  echo "$kernel" > "$dir/unpacked"
fi

# The initial file system: busybox, the modules in loading order, and guest/init.
version=$(basename "$(echo "$dir"/root/lib/modules/*)")
depmod -b "$dir/root" "$version"
stage=$(mktemp -d)
trap 'rm -rf "$stage" ${download:+"$download"}' EXIT
mkdir -p "$stage"/{bin,proc,sys,dev,host,scratch,root,modules}
cp /bin/busybox "$stage/bin/"
for applet in sh mount mkdir insmod chroot poweroff cat echo ip; do ln -s busybox "$stage/bin/$applet"; done
install -m 755 "$here/guest/init" "$stage/init"
for module in virtio_pci 9pnet_virtio 9p overlay crc32_generic crc32_pclmul dummy virtio_net ib_uverbs rdma_rxe; do
  if ! needs=$(modprobe -d "$dir/root" -S "$version" --show-depends "$module"); then
    echo "prepare: $kernel has no module $module" >&2
    exit 1
  fi
  while read -r how path _; do
    name=$(basename "$path")
    if [ "$how" = insmod ] && [ ! -e "$stage/modules/$name" ]; then
      cp "$path" "$stage/modules/"
      echo "$name" >> "$stage/modules/order"
    fi
  done <<< "$needs"
done
(cd "$stage" && find . | cpio -o -H newc --quiet | zstd -q -f -12 -o "$dir/initramfs")
echo "prepare: $kernel, $(wc -l < "$stage/modules/order") modules, ready in $dir"
