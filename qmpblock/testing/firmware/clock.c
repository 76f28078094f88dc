/* Time: the CPU's time stamp counter, calibrated against the 8254, which every machine has.
 * Both stand still while the VM is stopped, so latencies leave a pause or a switchover out. */
#include "cpu.h"

#define PIT_HZ 1193182u
#define PIT_COUNTER 0x40
#define PIT_COMMAND 0x43

static u32 counts_per_microsecond;     /* 0: not known */

u64 clock_now(void)
{
    u32 low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

static void pit_start(u16 reload)
{
    outb(PIT_COMMAND, 0x34);    /* counter 0, both bytes, mode 2: count down, then reload */
    outb(PIT_COUNTER, reload & 255);
    outb(PIT_COUNTER, reload >> 8);
}

static u16 pit_count(void)
{
    u8 low;

    outb(PIT_COMMAND, 0);       /* latch counter 0 */
    low = inb(PIT_COUNTER);
    return low | inb(PIT_COUNTER) << 8;
}

void clock_calibrate(void)
{
    u32 best = ~0u;

    if (counts_per_microsecond)
        return;
    pit_start(0);               /* 65536 counts, 55 ms */
    for (int tries = 0; tries < 3; tries++) {
        u64 began = clock_now(), lasted;
        u16 first = pit_count(), passed;
        u32 reads = 0, rate;

        do {
            passed = first - pit_count();
            lasted = clock_now() - began;
            if (++reads == 1000000)     /* microvm can be told to have no timer */
                return;
        } while (passed < PIT_HZ / 250);
        /* The counter is read inside the span that `lasted` measures, so a vCPU that lost its
           host CPU meanwhile (for 55 ms even) can only make the rate too large. */
        rate = divide(divide(lasted * PIT_HZ, passed, 0), 1000000, 0);
        if (rate < best)
            best = rate;
    }
    counts_per_microsecond = best ? best : 1;
    pit_start(PIT_HZ / 100);    /* what ticks_enable() lets through */
}

u64 clock_microseconds(u64 counts)
{
    return counts_per_microsecond ? divide(counts, counts_per_microsecond, 0) : 0;
}
