"""Run what follows on a host of its own that the public internet could reach."""

_PUBLIC = """
mount -t sysfs sysfs /sys && ip link set lo up
for each in inner:10.98.0.1 outer:8.8.4.4; do
    name=${each%:*}
    ip link add "$name" type veth peer name "$name-end" && ip link set "$name-end" up
    ip address add "${each#*:}/24" dev "$name" && ip link set "$name" up
done
exec "$@"
"""
#: In front of a command: it has a private address on one device and one of the world's on another.
IN_PUBLIC = ["unshare", "--net", "--mount", "sh", "-c", _PUBLIC, "sh"]
