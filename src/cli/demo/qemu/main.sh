# What the demo's guest is for: it counts in its memory, and says what it has on its disk.
#
#   line N X                  line number N, with X in it, is on the disk (flushed)
#   checked N disk D memory M all N lines were read from the disk again: D are wrong; M is 1 if 4 MiB of
#                             memory are not as they were
#   TROUBLE: ...              it cannot go on
dd if=/dev/urandom of=/ram bs=64k count=64 2>/dev/null
sum=$(md5sum </ram)
n=0 x=1
while :; do
    n=$((n + 1)) x=$((x * 16807 % 2147483647))
    echo "$n $x" | dd of=/data/lines oflag=append conv=notrunc,fsync 2>/dev/null ||
        echo "TROUBLE: line $n cannot be written"
    echo "line $n $x"
    if [ $((n % 32)) = 0 ]; then
        echo 3 >/proc/sys/vm/drop_caches
        memory=0
        [ "$(md5sum </ram)" = "$sum" ] || memory=1
        disk=$(awk -v last=$n 'BEGIN { x = 1 }
            { x = x * 16807 % 2147483647; if ($1 != NR || $2 != x) bad++ }
            END { print bad + (NR != last) }' /data/lines)
        echo "checked $n disk $disk memory $memory"
    fi
    sleep 0.02
done
