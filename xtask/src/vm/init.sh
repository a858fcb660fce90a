#!/bin/busybox sh
# The first process of a test machine: mounts, modules, `mesh-node check`, the tests, the result, off.
/bin/busybox --install -s
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# The tests' own process plays the daemon; the root group would be every process's.
mkdir -p /sys/fs/cgroup/init && echo 0 >/sys/fs/cgroup/init/cgroup.procs
for module in veth bridge nf_tables nft_chain_nat nft_nat nft_compat nf_nat xt_nat iptable_nat inet_diag tcp_diag udp_diag; do
    modprobe "$module" 2>/dev/null
done
ip link set lo up
dmesg -n 1
ulimit -n 65536
. /vm.conf
[ -z "$DISABLE" ] || export NODEMESH_DISABLE_FEATURES="$DISABLE"
echo "kernel $(uname -r)"
/nodemesh/debug/mesh-node check
status=$?
if [ $status -eq 0 ] && [ -n "$TESTS" ]; then
    # shellcheck disable=SC2086
    (cd / && /nodemesh/debug/deps/e2e --test-threads 1 $TESTS)
    status=$?
fi
echo "VM-RESULT $status"
poweroff -f
