/* PCI without firmware: what is there, where its registers go, and hot-unplug. */
#include "cpu.h"

#define CONFIG_ADDRESS 0xcf8
#define CONFIG_DATA 0xcfc
#define BUSES 16u

/* Each function's one memory BAR that we use lies at a place of its own, whatever else is or was
   plugged: 16 MiB a bus, 64 KiB a function, from an address that RAM never reaches. */
#define BUS_WINDOW(bus) (0xe0000000u + ((u32)(bus) << 24))
#define FUNCTION_WINDOW(function) (0xe0000000u + ((u32)(function) << 16))
#define FUNCTION_WINDOW_SIZE 0x10000u

enum { ID = 0x00, COMMAND = 0x04, HEADER = 0x0c, BAR0 = 0x10, BUS_NUMBERS = 0x18, IO_WINDOW = 0x1c,
       MEMORY_WINDOW = 0x20, PREFETCHABLE_WINDOW = 0x24, CAPABILITIES = 0x34 };
#define COMMAND_MEMORY 2u
#define COMMAND_MASTER 4u
#define CAPABILITY_EXPRESS 0x10

/* PCI Express capability: slot control in the low half of its register, status in the high. */
#define SLOT_CONTROL 0x18
#define SLOT_POWER_OFF 0x0400u
#define SLOT_INDICATOR_MASK 0x0300u
#define SLOT_INDICATOR_ON 0x0100u
#define SLOT_INDICATOR_OFF 0x0300u
#define SLOT_BUTTON_PRESSED 0x00010000u

static u8 next_bus = 1;

int pci_present(void)
{
    outl(CONFIG_ADDRESS, 0x80000000u);
    return inl(CONFIG_ADDRESS) == 0x80000000u;
}

u32 pci_read(u16 function, u8 offset)
{
    outl(CONFIG_ADDRESS, 0x80000000u | (u32)function << 8 | (offset & 0xfc));
    return inl(CONFIG_DATA);
}

void pci_write(u16 function, u8 offset, u32 value)
{
    outl(CONFIG_ADDRESS, 0x80000000u | (u32)function << 8 | (offset & 0xfc));
    outl(CONFIG_DATA, value);
}

u8 pci_capability(u16 function, u8 id, u8 after)
{
    u8 at = after ? pci_read(function, after) >> 8 : pci_read(function, CAPABILITIES);

    /* 48 capabilities fill the configuration space: a list that is longer is a circle */
    for (int i = 0; i < 48 && (at & 0xfc); i++) {
        u32 head = pci_read(function, at & 0xfc);

        if ((head & 0xff) == id)
            return at & 0xfc;
        at = head >> 8;
    }
    return 0;
}

u32 pci_place_bar(u16 function, u8 bar)
{
    u8 at = BAR0 + bar * 4;
    u32 old = pci_read(function, at), size;

    if (bar > 5 || old & 1)     /* an I/O BAR */
        return 0;
    if (old & ~0xfu)            /* placed before: a rescan */
        return old & ~0xfu;
    pci_write(function, at, ~0u);
    size = ~(pci_read(function, at) & ~0xfu) + 1;
    pci_write(function, at, 0);
    if (!size || size > FUNCTION_WINDOW_SIZE)
        return 0;
    pci_write(function, at, FUNCTION_WINDOW(function));
    if ((old & 6) == 4)         /* 64 bits wide */
        pci_write(function, at + 4, 0);
    pci_write(function, COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
    return FUNCTION_WINDOW(function);
}

/* The register of a bridge's slot, or 0 when it is no slot. */
static u8 slot_register(u16 bridge)
{
    u8 express = pci_capability(bridge, CAPABILITY_EXPRESS, 0);

    return express && pci_read(bridge, express) & 1u << 24 ? express + SLOT_CONTROL : 0;
}

static void slot_power(u16 bridge, u8 slot, int on)
{
    u32 control = pci_read(bridge, slot) & 0xffffu & ~(SLOT_INDICATOR_MASK | SLOT_POWER_OFF);

    /* the high half's events are cleared by writing ones to them */
    pci_write(bridge, slot, control | (on ? SLOT_INDICATOR_ON : SLOT_INDICATOR_OFF | SLOT_POWER_OFF)
              | 0x001f0000u);
}

/* The bus behind a bridge, opened; 0: no more buses. */
static u8 open_bridge(u16 bridge)
{
    u8 bus = pci_read(bridge, BUS_NUMBERS) >> 8, slot = slot_register(bridge);
    u32 window;

    if (!bus) {
        if (next_bus == BUSES)
            return 0;
        bus = next_bus++;
        window = BUS_WINDOW(bus) >> 16;
        pci_write(bridge, BUS_NUMBERS, bus << 16 | bus << 8 | bridge >> 8);
        pci_write(bridge, IO_WINDOW, 0x00f0);                   /* none */
        pci_write(bridge, MEMORY_WINDOW, (window | 0xf0) << 16 | window);
        pci_write(bridge, PREFETCHABLE_WINDOW, 0x0000fff0);     /* none */
        pci_write(bridge, COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
    }
    if (slot && pci_read(bridge, slot) & SLOT_POWER_OFF)
        slot_power(bridge, slot, 1);    /* a card that came later waits for it */
    return bus;
}

static int is_bridge(u16 function)
{
    return (pci_read(function, HEADER) >> 16 & 0x7f) == 1;
}

static void scan_bus(u8 bus, void (*found)(u16, u32))
{
    for (u16 device = 0; device < 32; device++) {
        u16 first = bus << 8 | device << 3;
        u16 functions = pci_read(first, HEADER) >> 16 & 0x80 ? 8 : 1;

        if (pci_read(first, ID) == ~0u)     /* there is no function 1 without function 0 */
            continue;
        for (u16 function = first; function < first + functions; function++) {
            u32 id = pci_read(function, ID);
            u8 behind;

            if (id == ~0u)
                continue;
            if (is_bridge(function)) {
                behind = open_bridge(function);
                if (behind > bus)
                    scan_bus(behind, found);
            } else {
                found(function, id);
            }
        }
    }
}

void pci_scan(void (*found)(u16 function, u32 id))
{
    scan_bus(0, found);
}

/* ACPI's way (i440fx, and q35 by default): a register says which slots of the selected bus are
   to go, another lets them go. */
static u32 eject_acpi(u16 base)
{
    u32 count = 0;

    for (u32 bus = 0; bus < BUSES; bus++) {
        u32 down;

        outl(base + 0x10, bus);
        down = inl(base + 0x04);
        if (!down || down == ~0u)
            continue;
        outl(base + 0x08, down);
        for (; down; down &= down - 1)
            count++;
    }
    return count;
}

/* PCI Express's way: the attention button of a slot with power was pressed (without power it
   announces a new card), and we switch the power off. */
static u32 eject_express(void)
{
    u32 count = 0;

    for (u16 function = 0; function < 256; function++) {
        u8 slot;

        if (pci_read(function, ID) == ~0u || !is_bridge(function))
            continue;
        slot = slot_register(function);
        if (slot && (pci_read(function, slot) & (SLOT_BUTTON_PRESSED | SLOT_POWER_OFF)) ==
                        SLOT_BUTTON_PRESSED) {
            slot_power(function, slot, 0);
            count++;
        }
    }
    return count;
}

u32 pci_eject(void)
{
    if (!pci_present())
        return 0;
    return eject_acpi(pci_read(0, ID) == 0x12378086u ? 0xae00 : 0x0cc0) + eject_express();
}
