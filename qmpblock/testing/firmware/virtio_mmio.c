/* virtio over MMIO, as on microvm: legacy by default, version 1 with
 * `-global virtio-mmio.force-legacy=false`.  Registers: virtio 1.2, 4.2.2 and 4.2.4. */
#include "cpu.h"

#define TRANSPORT(index) ((volatile u8 *)(0xfeb00000u + (index) * 0x200u))
#define MAGIC_VALUE 0x74726976u
enum { MAGIC = 0x00, VERSION = 0x04, TYPE = 0x08, DEVICE_FEATURES = 0x10,
       DEVICE_FEATURES_SELECT = 0x14, DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SELECT = 0x24,
       GUEST_PAGE_SIZE = 0x28, QUEUE_SELECT = 0x30, QUEUE_SIZE_MAX = 0x34, QUEUE_SIZE = 0x38,
       QUEUE_ALIGN = 0x3c, QUEUE_PAGE = 0x40, QUEUE_READY = 0x44, STATUS = 0x70,
       QUEUE_TABLE = 0x80, QUEUE_AVAILABLE = 0x90, QUEUE_USED = 0xa0, CONFIG = 0x100 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
#define PAGE 4096u

u8 virtio_mmio_type(u16 index)
{
    u32 type;

    if (read32(TRANSPORT(index) + MAGIC) != MAGIC_VALUE)
        return 0;
    type = read32(TRANSPORT(index) + TYPE);
    return type == VIRTIO_BLOCK || type == VIRTIO_SCSI ? type : 0;
}

static void write_address(volatile u8 *at, volatile void *address)
{
    write32(at, (u32)address);
    write32(at + 4, 0);
}

int virtio_mmio_attach(struct virtio *device, u16 index)
{
    volatile u8 *registers = TRANSPORT(index);
    struct queue *queue = device->queue;
    int legacy = read32(registers + VERSION) == 1;
    u8 status = ACKNOWLEDGE | DRIVER;

    device->registers = registers;
    device->config = registers + CONFIG;
    write32(registers + STATUS, 0);
    write32(registers + STATUS, ACKNOWLEDGE);
    write32(registers + STATUS, status);
    write32(registers + DEVICE_FEATURES_SELECT, 0);
    device->features = read32(registers + DEVICE_FEATURES) & virtio_wanted_features(device->type);
    write32(registers + DRIVER_FEATURES_SELECT, 0);
    write32(registers + DRIVER_FEATURES, device->features);
    if (!legacy) {
        write32(registers + DRIVER_FEATURES_SELECT, 1);
        write32(registers + DRIVER_FEATURES, 1);        /* bit 32: version 1 */
        status |= FEATURES_OK;
        write32(registers + STATUS, status);
        if (!(read32(registers + STATUS) & FEATURES_OK))
            return 0;
    }
    if (!(device->features & FEATURE_INDIRECT))
        return 0;

    if (legacy)
        write32(registers + GUEST_PAGE_SIZE, PAGE);
    write32(registers + QUEUE_SELECT, virtio_request_queue(device->type));
    if (read32(registers + QUEUE_SIZE_MAX) < REQUESTS)
        return 0;
    write32(registers + QUEUE_SIZE, REQUESTS);
    if (legacy) {
        write32(registers + QUEUE_ALIGN, PAGE);
        write32(registers + QUEUE_PAGE, (u32)queue / PAGE);
    } else {
        write_address(registers + QUEUE_TABLE, queue->table);
        write_address(registers + QUEUE_AVAILABLE, &queue->available_flags);
        write_address(registers + QUEUE_USED, &queue->used_flags);
        write32(registers + QUEUE_READY, 1);
    }
    write32(registers + STATUS, status | DRIVER_OK);
    return 1;
}
