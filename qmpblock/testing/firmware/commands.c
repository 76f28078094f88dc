/* The commands of the serial protocol; README.md describes them. */
#include "cpu.h"

#define VERSION 3
#define MOST_ARGUMENTS 11
#define RANGE_SECTORS 0x200000u         /* 1 GiB: of one discard or write zeroes */

static struct disk *disk;               /* argument 0, where the command takes a disk */
static u64 arguments[MOST_ARGUMENTS];
static u32 tag;

static int fail(const char *why)
{
    put("ER ");
    put_number(tag);
    put_char(' ');
    put(why);
    put_char('\n');
    return 0;
}

static int fail_io(u32 status, u64 lba)
{
    put("ER ");
    put_number(tag);
    put(" the disk failed the request");
    put_field("status", status);
    put_field("lba", lba);
    put_char('\n');
    return 0;
}

static void ok(void)
{
    put("OK ");
    put_number(tag);
}

/* Does one operation piece by piece.  `fill` makes the data of a piece before it is written,
   `use` takes what was read. */
static int transfer(enum operation operation, u64 lba, u64 sectors, u32 most,
                    void (*fill)(u32 *data, u64 lba, u32 sectors),
                    void (*use)(u32 *data, u32 sectors))
{
    struct request *request = request_await(disk);
    u32 status = 0;

    while (sectors) {
        u32 piece = sectors < most ? sectors : most;

        if (fill)
            fill(request_buffer(request), lba, piece);
        request_submit(request, operation, lba, piece);
        status = request_wait(request);
        if (status)
            break;
        if (use)
            use(request_buffer(request), piece);
        lba += piece;
        sectors -= piece;
    }
    request_release(request);
    return status ? fail_io(status, lba) : 1;
}

static void fill_stamps(u32 *data, u64 lba, u32 sectors)
{
    for (u32 i = 0; i < sectors; i++)
        stamp(data + i * SECTOR / 4, lba + i, arguments[3], arguments[4]);
}

static void fill_byte(u32 *data, u64 lba, u32 sectors)
{
    (void)lba;
    set_words(data, (u32)arguments[3] * 0x01010101u, sectors * SECTOR / 4);
}

static u32 read_crc;

static void use_crc(u32 *data, u32 sectors)
{
    read_crc = crc32(read_crc, (u8 *)data, sectors * SECTOR);
}

static int do_write(void)
{
    return transfer(WRITE, arguments[1], arguments[2], REQUEST_SECTORS, fill_stamps, 0);
}

static int do_fill(void)
{
    if (arguments[3] > 255)
        return fail("the byte must be 0 to 255");
    return transfer(WRITE, arguments[1], arguments[2], REQUEST_SECTORS, fill_byte, 0);
}

static int do_read(void)
{
    read_crc = 0;
    if (!transfer(READ, arguments[1], arguments[2], REQUEST_SECTORS, 0, use_crc))
        return 0;
    ok();
    put(" crc32=");
    put_hex(read_crc, 8);
    put_char('\n');
    return 0;
}

static int do_flush(void)
{
    return transfer(FLUSH, 0, 1, 1, 0, 0);
}

static int do_discard(void)
{
    return transfer(DISCARD, arguments[1], arguments[2], RANGE_SECTORS, 0, 0);
}

static int do_zero(void)
{
    return transfer(ZEROES, arguments[1], arguments[2], RANGE_SECTORS, 0, 0);
}

static int do_stress(void)
{
    struct stress_area area = {arguments[1], arguments[2], arguments[3]};
    struct stress_load load = {arguments[4], arguments[5], arguments[6],
                               arguments[7], arguments[8], arguments[9],
                               arguments[10]};
    const char *why = 0;

    for (u32 i = 2; i < MOST_ARGUMENTS; i++)
        if (arguments[i] >> 32)
            why = "a number is too large";
    if (!why)
        why = stress_start(disk, area, load);
    return why ? fail(why) : 1;
}

static int report(void)
{
    ok();
    stress_progress(disk);
    put_char('\n');
    return 0;
}

static int do_progress(void)
{
    return disk->run ? report() : fail("no stress run was started on this disk");
}

static int do_latency(void)
{
    if (!disk->run)
        return fail("no stress run was started on this disk");
    ok();
    stress_latency(disk);
    put_char('\n');
    return 0;
}

static int do_stop(void)
{
    if (!disk->run)
        return fail("no stress run was started on this disk");
    stress_stop(disk);
    return report();
}

static int do_check(void)
{
    u32 status, checked, bad;
    u64 lba;

    if (!disk->run)
        return fail("no stress run was started on this disk");
    if (stress_running(disk))
        return fail("a stress run is under way on this disk");
    status = stress_check(disk, &checked, &bad, &lba);
    if (status)
        return fail_io(status, lba);
    ok();
    put_field("blocks", checked);
    put_field("bad", bad);
    put_char('\n');
    return 0;
}

/* Writes one word to each page of that many MiB, a new one each time. */
static int do_dirty(void)
{
    static u32 generation;

    if (arguments[0] > 2048)
        return fail("at most 2048 MiB");
    generation++;
    for (u32 page = 0; page < (u32)arguments[0] * 256; page++)
        write32(DIRTY_RAM + page * 4096, generation);
    return 1;
}

static const char *feature_letters(u32 features)
{
    static char text[5];
    char *end = text;

    if (features & FEATURE_READ_ONLY)
        *end++ = 'r';
    if (features & FEATURE_FLUSH)
        *end++ = 'f';
    if (features & FEATURE_DISCARD)
        *end++ = 'd';
    if (features & FEATURE_ZEROES)
        *end++ = 'z';
    *end = 0;
    return text;
}

/* " disk=NUMBER,WHERE,KIND,SECTORS,FEATURES" */
static void describe_disk(struct disk *which)
{
    struct virtio *device = which->device;

    put_field("disk", which - disks);
    put_char(',');
    if (device->transport == TRANSPORT_PCI) {
        put_hex(device->where >> 8, 2);
        put_char(':');
        put_hex(device->where >> 3 & 31, 2);
        put_char('.');
        put_number(device->where & 7);
    } else {
        put("mmio.");
        put_number(device->where);
    }
    if (device->type == VIRTIO_SCSI) {
        put_char('/');
        put_number(which->target);
        put_char(':');
        put_number(which->lun);
    }
    put(device->type == VIRTIO_SCSI ? ",scsi," : ",blk,");
    put_number(disk_sectors(which));
    put_char(',');
    put(device->type == VIRTIO_SCSI ? "fdz" : feature_letters(device->features));
}

void hello(void)
{
    put_field("version", VERSION);
    for (u32 i = 0; i < DISKS; i++)
        if (disks[i].device)
            describe_disk(&disks[i]);
}

static int do_hello(void)
{
    ok();
    hello();
    put_char('\n');
    return 0;
}

static int do_rescan(void)
{
    virtio_scan();
    return do_hello();
}

static int do_eject(void)
{
    u32 count = pci_eject();

    virtio_scan();
    ok();
    put_field("ejected", count);
    hello();
    put_char('\n');
    return 0;
}

static int do_off(void)
{
    ok();
    put_char('\n');
    power_off();
    return 0;
}

static int do_reset(void)
{
    ok();
    put_char('\n');
    power_reset();
    return 0;
}

/* A command returns 1 for a plain OK, or 0 when it has answered itself. */
static const struct command {
    const char *name;
    u8 arguments, takes_disk;
    int (*run)(void);
} commands[] = {
    {"hello", 0, 0, do_hello},
    {"rescan", 0, 0, do_rescan},
    {"write", 5, 1, do_write},
    {"fill", 4, 1, do_fill},
    {"read", 3, 1, do_read},
    {"flush", 1, 1, do_flush},
    {"discard", 3, 1, do_discard},
    {"zero", 3, 1, do_zero},
    {"stress", 11, 1, do_stress},
    {"progress", 1, 1, do_progress},
    {"latency", 1, 1, do_latency},
    {"stop", 1, 1, do_stop},
    {"check", 1, 1, do_check},
    {"dirty", 1, 0, do_dirty},
    {"eject", 0, 0, do_eject},
    {"off", 0, 0, do_off},
    {"reset", 0, 0, do_reset},
};

static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* The next word of the line, ended with a zero; empty at the end of the line. */
static char *word(char **line)
{
    char *start = *line, *end;

    while (*start == ' ')
        start++;
    for (end = start; *end && *end != ' '; end++)
        ;
    *line = *end ? end + 1 : end;
    *end = 0;
    return start;
}

static int number(const char *text, u64 *value)
{
    if (!*text)
        return 0;
    for (*value = 0; *text >= '0' && *text <= '9'; text++)
        *value = *value * 10 + (*text - '0');
    return !*text;
}

void command_run(char *line)
{
    u64 value;
    char *name;

    tag = 0;
    if (!number(word(&line), &value)) {
        fail("a command begins with a number");
        return;
    }
    tag = value;
    name = word(&line);
    for (u32 i = 0; i < sizeof commands / sizeof *commands; i++) {
        const struct command *command = &commands[i];

        if (!same(command->name, name))
            continue;
        for (u32 j = 0; j < command->arguments; j++)
            if (!number(word(&line), &arguments[j])) {
                fail("an argument is missing or not a number");
                return;
            }
        if (*word(&line)) {
            fail("too many arguments");
            return;
        }
        if (command->takes_disk) {
            disk = arguments[0] < DISKS ? &disks[arguments[0]] : 0;
            if (!disk || !disk->device) {
                fail("no disk has this number");
                return;
            }
        }
        if (command->run()) {
            ok();
            put_char('\n');
        }
        return;
    }
    fail("no such command");
}
