/* The first serial port: interrupts in, polling out. */
#include "cpu.h"

#define COM1 0x3f8
#define LINE_STATUS (COM1 + 5)
#define RECEIVED_SIZE 4096u

static volatile u8 received[RECEIVED_SIZE];
static volatile u32 received_head, received_tail;

void console_init(void)
{
    outb(COM1 + 3, 0x80);       /* divisor latch: 115200 baud */
    outb(COM1, 1);
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 3);          /* 8 bits, no parity */
    outb(COM1 + 2, 7);          /* FIFOs on and empty, an interrupt for each byte */
    outb(COM1 + 4, 0x0b);       /* OUT2 lets the interrupt through */
    outb(COM1 + 1, 1);          /* interrupt on received data */
}

void console_receive(void)
{
    while (inb(LINE_STATUS) & 1)
        received[received_head++ % RECEIVED_SIZE] = inb(COM1);
    inb(COM1 + 2);
}

int console_pending(void)
{
    return received_head != received_tail;
}

char console_take(void)
{
    return received[received_tail++ % RECEIVED_SIZE];
}

void put_char(char c)
{
    while (!(inb(LINE_STATUS) & 0x20))
        ;
    outb(COM1, c);
}

void put(const char *text)
{
    while (*text)
        put_char(*text++);
}

void put_number(u64 value)
{
    char digits[21];
    u32 at = sizeof digits - 1, digit;

    digits[at] = 0;
    do {
        value = divide(value, 10, &digit);
        digits[--at] = '0' + digit;
    } while (value);
    put(digits + at);
}

void put_hex(u32 value, int digits)
{
    while (digits--)
        put_char("0123456789abcdef"[value >> digits * 4 & 15]);
}

void put_field(const char *name, u64 value)
{
    put_char(' ');
    put(name);
    put_char('=');
    put_number(value);
}
