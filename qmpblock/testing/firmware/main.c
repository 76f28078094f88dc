/* Start and main loop. */
#include "cpu.h"

#define LINE_SIZE 256u

/* Completes what the devices finished and advances the stress runs; when there was nothing to
   do, sleeps until an interrupt.  `listening` says whether received bytes end the sleep: a
   command that waits for its disk leaves them where they are. */
void work(int listening)
{
    u32 seen = ticks;

    if (disks_poll() | stress_step())
        return;
    interrupts_off();
    if (virtio_pending() || ticks != seen || (listening && (console_pending() || power_button())))
        interrupts_on();
    else
        interrupts_on_and_halt();
}

void main(void) __attribute__((noreturn));
void main(void)
{
    static char line[LINE_SIZE];
    u32 length = 0;

    console_init();
    crc32_init();
    disks_init();
    interrupts_init();
    power_init();
    virtio_scan();
    put("*READY");
    hello();
    put_char('\n');
    for (;;) {
        if (power_button()) {
            put("*POWER\n");
            power_off();
        }
        if (!console_pending()) {
            work(1);
            continue;
        }
        char c = console_take();

        if (c != '\n' && c != '\r') {
            if (length < LINE_SIZE)
                line[length++] = c;
        } else if (length == LINE_SIZE) {
            put("ER 0 the line is too long\n");
            length = 0;
        } else if (length) {
            line[length] = 0;
            command_run(line);
            length = 0;
        }
    }
}
