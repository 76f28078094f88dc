/* Interrupts.  The 8259s deliver the serial port (4), the timer (0), the ACPI power button (9)
 * and PCI devices (11); on microvm the I/O APICs deliver the virtio-mmio transports. */
#include "cpu.h"

#define PIC1 0x20
#define PIC2 0xa0
#define VECTOR_PIC 0x20
#define VECTOR_APIC 0x30
#define LOCAL_APIC 0xfee00000u
#define HANDLER __attribute__((interrupt))

struct frame;
static u64 gates[VECTOR_APIC + 1];

volatile u32 ticks;

HANDLER static void on_tick(struct frame *frame)
{
    (void)frame;
    ticks++;
    outb(PIC1, 0x20);
}

HANDLER static void on_serial(struct frame *frame)
{
    (void)frame;
    console_receive();
    outb(PIC1, 0x20);
}

HANDLER static void on_power(struct frame *frame)
{
    (void)frame;
    power_interrupt();
    outb(PIC2, 0x20);
    outb(PIC1, 0x20);
}

HANDLER static void on_device(struct frame *frame)
{
    (void)frame;
    virtio_interrupt();
    outb(PIC2, 0x20);
    outb(PIC1, 0x20);
}

HANDLER static void on_spurious(struct frame *frame)
{
    (void)frame;
    outb(PIC1, 0x20);
}

HANDLER static void on_apic(struct frame *frame)
{
    (void)frame;
    virtio_interrupt();
    write32(LOCAL_APIC + 0xb0, 0);
}

static void gate(u32 vector, void (*handler)(struct frame *))
{
    u32 address = (u32)handler;

    gates[vector] = (u64)((address & 0xffff0000u) | 0x8e00) << 32 | 0x00080000u | (address & 0xffff);
}

static void io_apic_init(u32 base, u32 first_pin)
{
    for (u32 pin = first_pin; pin < 24; pin++) {
        write32(base, 0x11 + 2 * pin);
        write32(base + 16, 0);                          /* to CPU 0 */
        write32(base, 0x10 + 2 * pin);
        write32(base + 16, 0x8000 | VECTOR_APIC);       /* level triggered */
    }
}

void ticks_enable(int on)
{
    /* 0: timer, 1: keyboard, 2: cascade, 4: serial; a clear bit lets the interrupt through */
    outb(PIC1 + 1, on ? 0xea : 0xeb);
}

void interrupts_init(void)
{
    struct { u16 limit; void *base; } __attribute__((packed)) table = {sizeof gates - 1, gates};

    for (u32 i = 0; i < 8; i++)
        gate(VECTOR_PIC + i, on_spurious);
    for (u32 i = 8; i < 16; i++)
        gate(VECTOR_PIC + i, on_device);
    gate(VECTOR_PIC + 0, on_tick);
    gate(VECTOR_PIC + 4, on_serial);
    gate(VECTOR_PIC + 9, on_power);
    gate(VECTOR_APIC, on_apic);
    __asm__ volatile("lidt %0" ::"m"(table));

    write32(LOCAL_APIC + 0xf0, 0x100 | VECTOR_APIC);    /* on */
    write32(LOCAL_APIC + 0x350, 0x700);                 /* LINT0 is where the 8259s come in */

    outb(PIC1, 0x11);           /* edge triggered, cascaded, four words */
    outb(PIC2, 0x11);
    outb(PIC1 + 1, VECTOR_PIC);
    outb(PIC2 + 1, VECTOR_PIC + 8);
    outb(PIC1 + 1, 4);
    outb(PIC2 + 1, 2);
    outb(PIC1 + 1, 1);
    outb(PIC2 + 1, 1);
    outb(PIC2 + 1, 0xf5);       /* 9 and 11 */
    outb(0x4d1, 0x0a);          /* those are level triggered */
    ticks_enable(0);
    if (!pci_present()) {
        io_apic_init(0xfec00000u, 16);  /* the first 16 come through the 8259s */
        io_apic_init(0xfec10000u, 0);   /* microvm's second one, if it has one */
    }
    interrupts_on();
}
