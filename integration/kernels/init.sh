#!/bin/busybox sh
# The initramfs: loads the modules in the order of their names, and goes on with the
# disk. If it ends, the kernel panics, and the machine stops.
export PATH=/bin
/bin/busybox mkdir -p /dev /proc /sys /root
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*; do
	insmod "$module" || exit 1
done
until [ -b /dev/vda ]; do sleep 0.1; done # the host has a limit for all of this
mount -t ext4 /dev/vda /root || exit 1
for dir in dev proc sys; do mount --move "/$dir" "/root/$dir"; done
exec switch_root /root /init
