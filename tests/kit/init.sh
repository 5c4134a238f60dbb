#!/bin/sh
# The guest's whole user space: load the block drivers, then answer on the second serial port.
# A request is one line, `<id> <command, escaped for printf %b>`. The answer is the command's raw output, then a line `<id> <exit status>`.
# Escapes one way and a random id the other way: no byte in a command or its output can be mistaken for the frame.

/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/null >/dev/console 2>&1

while read -r module; do
	insmod "/modules/$module.ko" || echo "init: $module does not load"
done </modules/order

stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo ready >&3
while :; do
	read -r id command <&3
	[ -n "$command" ] || continue
	(eval "$(printf %b "$command")") >&3 2>&1 3>&-
	printf '\n%s %s\n' "$id" "$?" >&3
done
