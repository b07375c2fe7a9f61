#!/bin/busybox sh
# The first process of the guest: drivers, a file system on the disk; then what the guest is for.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module" || echo "TROUBLE: cannot load $module"
done </modules/order
stty -echo
# Drivers find their devices in the background.
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
{ mke2fs /dev/vda >/dev/null && mount -t ext4 /dev/vda /data; } ||
    echo "TROUBLE: no file system on /dev/vda: the kernel has no driver for it"
# The agent sets the clock by a program that has this place.
ln -s /bin/busybox /sbin/hwclock
for port in /sys/class/virtio-ports/*; do
    [ -x /bin/qemu-ga ] && [ "$(cat "$port/name" 2>/dev/null)" = org.qemu.guest_agent.0 ] &&
        qemu-ga -d -m virtio-serial -p "/dev/${port##*/}" -f /run/qemu-ga.pid -t /run -l /run/qemu-ga.log
done
exec sh /main
