/* Off and reset, and the chips that do it.  Power management of the i440fx lies in the PIIX4's
 * function 3, of q35 in the ICH9's LPC bridge; microvm has ACPI's generic event device. */
#include "cpu.h"

#define PIIX3_ISA 0x70008086u
#define PIIX4_PM 0x71138086u
#define ICH9_LPC 0x29188086u
#define DEVICE_INTERRUPT 0x0b0b0b0bu    /* all four interrupt lines to IRQ 11 */
#define PM_BASE 0x600
#define PM_STATUS (PM_BASE + 0)
#define PM_ENABLE (PM_BASE + 2)
#define PM_CONTROL (PM_BASE + 4)
#define POWER_BUTTON 0x0100
#define SLEEP_ENABLE 0x2000             /* with sleep type 0, which is off on both chips */
#define GED_SLEEP 0xfea00200u
#define GED_RESET 0xfea00202u

static int power_management;
static volatile int button_pressed;

/* Wires the interrupts of PCI devices and maps power management, as firmware would. */
static void south_bridge(u16 function, u32 id)
{
    if (id == PIIX3_ISA) {
        pci_write(function, 0x60, DEVICE_INTERRUPT);
    } else if (id == ICH9_LPC) {
        pci_write(function, 0x60, DEVICE_INTERRUPT);
        pci_write(function, 0x68, DEVICE_INTERRUPT);
        pci_write(function, 0x40, PM_BASE | 1);
        pci_write(function, 0x44, 0x80);
    } else if (id == PIIX4_PM) {
        pci_write(function, 0x40, PM_BASE | 1);
        pci_write(function, 0x80, 1);
    }
    power_management |= id == ICH9_LPC || id == PIIX4_PM;
}

void power_init(void)
{
    if (!pci_present())
        return;
    pci_scan(south_bridge);
    if (power_management)
        outw(PM_ENABLE, POWER_BUTTON);
}

/* The chip holds its interrupt line up until the status is cleared, so here and not later. */
void power_interrupt(void)
{
    u16 status = inw(PM_STATUS);

    outw(PM_STATUS, status);
    if (status & POWER_BUTTON)
        button_pressed = 1;
}

int power_button(void)
{
    return button_pressed;
}

void power_off(void)
{
    if (power_management)
        outw(PM_CONTROL, SLEEP_ENABLE);
    else
        write8(GED_SLEEP, 0x34);        /* S5 and go */
}

/* One request, and then nothing more: QEMU resets a moment after it was asked, and a second request
 * in that moment would reset the guest that has just started again. */
void power_reset(void)
{
    if (pci_present()) {
        outb(0xcf9, 2);
        outb(0xcf9, 6);
    } else {
        write8(GED_RESET, 0x42);
    }
    for (;;)
        __asm__ volatile("cli; hlt");
}
