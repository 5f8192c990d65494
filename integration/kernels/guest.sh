#!/bin/sh
# The first process of a machine that has what a node needs: control groups, a loopback
# device, and the tests. What they print goes to the second serial port.
export PATH=/tools:/usr/sbin:/bin HOME=/root
mount -t tmpfs -o mode=755 run /run
mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
	echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control
done
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
sh /tests/run.sh > /dev/ttyS1 2>&1 < /dev/null
poweroff -f
