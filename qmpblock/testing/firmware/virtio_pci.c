/* virtio 1.x over PCI: every structure is found through the vendor capabilities, which
 * transitional devices have too, so that a legacy driver is not needed on any machine. */
#include "cpu.h"

#define CAPABILITY_VENDOR 9
enum { COMMON = 1, NOTIFY = 2, INTERRUPT = 3, DEVICE = 4 };     /* virtio 1.2, 4.1.4 */

/* The common configuration, virtio 1.2, 4.1.4.3 */
enum { DEVICE_FEATURE_SELECT = 0x00, DEVICE_FEATURE = 0x04, DRIVER_FEATURE_SELECT = 0x08,
       DRIVER_FEATURE = 0x0c, STATUS = 0x14, QUEUE_SELECT = 0x16, QUEUE_SIZE = 0x18,
       QUEUE_ENABLE = 0x1c, QUEUE_NOTIFY_OFFSET = 0x1e, QUEUE_TABLE = 0x20,
       QUEUE_AVAILABLE = 0x28, QUEUE_USED = 0x30 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

/* The address of the first structure of a kind that lies in memory; 0: there is none. */
static volatile u8 *structure(u16 function, u8 kind, u32 *multiplier)
{
    for (u8 at = 0; (at = pci_capability(function, CAPABILITY_VENDOR, at));) {
        u32 bar;

        if (pci_read(function, at) >> 24 != kind)
            continue;
        bar = pci_place_bar(function, pci_read(function, at + 4) & 0xff);
        if (!bar)
            continue;
        if (multiplier)
            *multiplier = pci_read(function, at + 16);
        return (volatile u8 *)(bar + pci_read(function, at + 8));
    }
    return 0;
}

static void write_address(volatile u8 *at, volatile void *address)
{
    write32(at, (u32)address);
    write32(at + 4, 0);
}

int virtio_pci_attach(struct virtio *device, u16 function)
{
    volatile u8 *common = structure(function, COMMON, 0), *notify;
    u32 multiplier = 0;

    notify = structure(function, NOTIFY, &multiplier);
    device->interrupt = structure(function, INTERRUPT, 0);
    device->config = structure(function, DEVICE, 0);
    if (!common || !notify || !device->interrupt || !device->config)
        return 0;
    device->registers = common;

    write8(common + STATUS, 0);
    while (read8(common + STATUS))      /* the reset is done when it reads 0 */
        ;
    write8(common + STATUS, ACKNOWLEDGE);
    write8(common + STATUS, ACKNOWLEDGE | DRIVER);
    write32(common + DEVICE_FEATURE_SELECT, 0);
    device->features = read32(common + DEVICE_FEATURE) & virtio_wanted_features(device->type);
    write32(common + DRIVER_FEATURE_SELECT, 0);
    write32(common + DRIVER_FEATURE, device->features);
    write32(common + DRIVER_FEATURE_SELECT, 1);
    write32(common + DRIVER_FEATURE, 1);        /* bit 32: version 1 */
    write8(common + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(read8(common + STATUS) & FEATURES_OK) || !(device->features & FEATURE_INDIRECT))
        return 0;

    write16(common + QUEUE_SELECT, virtio_request_queue(device->type));
    if (read16(common + QUEUE_SIZE) < REQUESTS)
        return 0;
    write16(common + QUEUE_SIZE, REQUESTS);
    write_address(common + QUEUE_TABLE, device->queue->table);
    write_address(common + QUEUE_AVAILABLE, &device->queue->available_flags);
    write_address(common + QUEUE_USED, &device->queue->used_flags);
    device->doorbell = (volatile u16 *)(notify + read16(common + QUEUE_NOTIFY_OFFSET) * multiplier);
    write16(common + QUEUE_ENABLE, 1);
    write8(common + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return 1;
}

/* An unplugged device does not answer; another one in its slot has not been set up. */
int virtio_pci_attached(struct virtio *device)
{
    u32 memory = pci_read(device->where, 4);

    return memory != ~0u && memory & 2 && read8(device->registers + STATUS) ==
           (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}
