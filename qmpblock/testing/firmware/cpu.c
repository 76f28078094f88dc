/* Interrupts.  The 8259s deliver the serial port (4), the timer (0), the ACPI power button (9)
 * and PCI devices (11); on microvm the I/O APICs deliver the virtio-mmio transports. */
#include "cpu.h"

#define PIC1 0x20
#define PIC2 0xa0
#define END_OF_INTERRUPT 0x20
#define LOCAL_APIC 0xfee00000u
#define APIC_END_OF_INTERRUPT 0xb0

/* The first 32 are the CPU's own exceptions: without a gate, they reset the machine. */
enum { VECTOR_FIRST = 0x20, TIMER = 0x20, SERIAL = 0x24, PIC1_SPURIOUS = 0x27, PIC2_FIRST = 0x28,
       POWER = 0x29, PIC2_SPURIOUS = 0x2f, VIRTIO_MMIO = 0x30, APIC_SPURIOUS = 0x3f, VECTORS };

extern const u8 interrupt_entries[];    /* interrupts.S */
static u64 gates[VECTORS];

volatile u32 ticks;

/* Whoever interrupted is heard before it is told so: its line is down by then, and what it has
 * to say after that is a new interrupt. */
void interrupt(u32 vector)
{
    switch (vector) {
    case APIC_SPURIOUS:     /* nothing is in service, in any of the three spurious cases */
    case PIC1_SPURIOUS:
        return;
    case PIC2_SPURIOUS:     /* but the first 8259 believes that the second has something */
        outb(PIC1, END_OF_INTERRUPT);
        return;
    case VIRTIO_MMIO:
        virtio_interrupt();
        write32(LOCAL_APIC + APIC_END_OF_INTERRUPT, 0);
        return;
    case TIMER:
        ticks++;
        break;
    case SERIAL:
        console_receive();
        break;
    case POWER:
        power_interrupt();
        break;
    default:
        virtio_interrupt();
    }
    if (vector >= PIC2_FIRST)
        outb(PIC2, END_OF_INTERRUPT);
    outb(PIC1, END_OF_INTERRUPT);
}

static void io_apic_init(u32 base, u32 first_pin)
{
    for (u32 pin = first_pin; pin < 24; pin++) {
        write32(base, 0x11 + 2 * pin);
        write32(base + 16, 0);                          /* to CPU 0 */
        write32(base, 0x10 + 2 * pin);
        write32(base + 16, 0x8000 | VIRTIO_MMIO);       /* level triggered */
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

    for (u32 vector = VECTOR_FIRST; vector < VECTORS; vector++) {
        u32 entry = (u32)interrupt_entries + (vector - VECTOR_FIRST) * 16;

        /* present, ring 0, a 32-bit interrupt gate (which clears IF) into the code segment */
        gates[vector] = (u64)((entry & 0xffff0000u) | 0x8e00) << 32 | 0x00080000u | (entry & 0xffff);
    }
    __asm__ volatile("lidt %0" ::"m"(table));

    write32(LOCAL_APIC + 0xf0, 0x100 | APIC_SPURIOUS);  /* on */
    write32(LOCAL_APIC + 0x350, 0x700);                 /* LINT0 is where the 8259s come in */

    outb(PIC1, 0x11);           /* edge triggered, cascaded, four words */
    outb(PIC2, 0x11);
    outb(PIC1 + 1, TIMER);
    outb(PIC2 + 1, PIC2_FIRST);
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
