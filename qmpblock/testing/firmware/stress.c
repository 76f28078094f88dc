/* The stress writer: a reproducible load, many requests in flight, whose acknowledged part the
 * host can compute.
 *
 * Write number q (from 1) fills block mix(q ^ seed) & (blocks - 1) with stamps that carry q.
 * Writes are issued in order; a block never has two requests in flight, so what a block holds
 * is decided by the order of issue alone.  `acked` is the end of the unbroken prefix of
 * acknowledged writes, `flushed` what `acked` was when the last completed flush was issued.
 *
 * Runs of a group keep step: none issues a write that is more than DEPTH beyond what any of
 * them has acknowledged.  So one number says how far all of their disks are at any instant. */
#include "cpu.h"

#define WINDOW 4096u                /* the farthest that a write may run ahead of `acked` */
#define BUSY 0x80000000u            /* in the table: this block has a request in flight */
#define DEEPEST (REQUESTS - 2)      /* leaves one request for a flush and one for a command */
#define CREDIT_REQUEST 100u         /* the price of a request; a tick earns `rate` credits */
#define LONGEST_SLEEP 100u          /* ticks that earn credits at once */

struct run {
    struct disk *disk;              /* null: this entry is free */
    struct stress_area area;
    struct stress_load load;
    u32 *table;                     /* per block: the last acknowledged sequence number */
    int on, stopping, flush_due, flushing;
    u32 issued, acked, flushed, reads, bad, errors, first_error;
    u32 in_flight, read_number;
    u32 credit, last_tick;
    u64 bad_lba;
    u32 bad_found, bad_expected;
    u64 latency_sum, latency_longest;
    u32 latency_count;
    u8 done[WINDOW];                /* of acked+1..issued, which are acknowledged */
};

static struct run runs[DISKS];

/* A stretch of the table's memory that no other run uses; null: too little is left. */
static u32 *table_place(struct run *for_run, u32 blocks)
{
    u32 *start = STRESS_TABLES;
    int moved;

    do {
        moved = 0;
        for (u32 i = 0; i < DISKS; i++) {
            struct run *run = &runs[i];

            if (run != for_run && run->disk && run->table < start + blocks &&
                start < run->table + run->area.blocks) {
                start = run->table + run->area.blocks;
                moved = 1;
            }
        }
    } while (moved);
    return start + blocks <= STRESS_TABLES + STRESS_TABLES_ENTRIES ? start : 0;
}

static void ticks_as_needed(void)
{
    int needed = 0;

    for (u32 i = 0; i < DISKS; i++)
        needed |= runs[i].on && runs[i].load.rate;
    ticks_enable(needed);
}

const char *stress_start(struct disk *disk, struct stress_area area, struct stress_load load)
{
    struct run *run = &runs[disk - disks];
    u32 *table;

    if (run->on)
        return "a stress run is under way on this disk";
    if (!area.blocks || area.blocks & (area.blocks - 1) || area.blocks > STRESS_TABLES_ENTRIES)
        return "the number of blocks must be a power of two, at most 2097152";
    if (!area.block_sectors || area.block_sectors > REQUEST_SECTORS)
        return "a block has 1 to 128 sectors";
    if (!load.depth || load.depth > DEEPEST)
        return "the queue depth must be 1 to 62";
    if (load.read_percent > 99)
        return "at most 99 percent of the requests can be reads";
    if (load.group && !(load.group >> (disk - disks) & 1))
        return "a group has the disk itself among its members";
    if (load.group >> (DISKS - 1) >> 1)
        return "no disk has such a number";
    if (load.total >= BUSY)
        return "at most 2147483647 writes";
    if (area.lba + (u64)area.blocks * area.block_sectors > disk_sectors(disk) ||
        area.lba > disk_sectors(disk))
        return "the area reaches past the end of the disk";
    table = table_place(run, area.blocks);
    if (!table)
        return "no memory is left for the tables of this many blocks";

    clock_calibrate();
    set_words((u32 *)run, 0, sizeof *run / 4);
    set_words(table, 0, area.blocks);
    run->disk = disk;
    run->area = area;
    run->load = load;
    run->table = table;
    run->last_tick = ticks;
    disk->run = run;
    run->on = 1;
    ticks_as_needed();
    return 0;
}

int stress_running(struct disk *disk)
{
    return disk->run && disk->run->on;
}

static u64 lba_of(struct run *run, u32 block)
{
    return run->area.lba + (u64)block * run->area.block_sectors;
}

/* Whether what was read of a block is its last acknowledged write. */
static int block_right(struct run *run, u32 block, u32 expected, const u32 *data)
{
    for (u32 i = 0; i < run->area.block_sectors; i++) {
        const u32 *sector = data + i * SECTOR / 4;

        if (stamp_matches(sector, lba_of(run, block) + i, expected, run->load.seed))
            continue;
        if (!run->bad) {
            run->bad_lba = lba_of(run, block) + i;
            run->bad_found = sector[4];
            run->bad_expected = expected;
        }
        return 0;
    }
    return 1;
}

static void acknowledge(struct run *run, u32 sequence)
{
    run->done[sequence % WINDOW] = 1;
    while (run->done[(run->acked + 1) % WINDOW])
        run->done[++run->acked % WINDOW] = 0;
}

static void account_latency(struct run *run, u64 began)
{
    u64 lasted = clock_microseconds(clock_now() - began);

    run->latency_sum += lasted;
    run->latency_count++;
    if (lasted > run->latency_longest)
        run->latency_longest = lasted;
}

/* Ends a run, and those that would wait for it. */
static void fail(struct run *run, u32 status)
{
    if (!run->errors++)
        run->first_error = status;
    run->stopping = 1;
    for (u32 i = 0; i < DISKS; i++)
        if (run->load.group >> i & 1)
            runs[i].stopping = 1;
}

void stress_abandon(struct disk *disk, u32 status)
{
    if (disk->run->on)
        fail(disk->run, status);
}

void stress_complete(struct request *request)
{
    struct run *run = request->run;
    u32 *entry = &run->table[request->block];

    run->in_flight--;
    account_latency(run, request->began);
    if (request->status) {          /* not acknowledged: `acked` stays below it */
        fail(run, request->status);
        if (request->operation != FLUSH)
            *entry &= ~BUSY;
    } else if (request->operation == WRITE) {
        *entry = request->sequence;
        acknowledge(run, request->sequence);
    } else if (request->operation == READ) {
        *entry &= ~BUSY;
        run->reads++;
        if (*entry && !block_right(run, request->block, *entry, request_buffer(request)))
            run->bad++;
    } else {
        run->flushed = request->sequence;
    }
    if (request->operation == FLUSH)
        run->flushing = 0;
    request_release(request);
}

/* Reads are spread among the writes by a counter of their own; a write's number says its block. */
static int next_is_read(struct run *run, u32 *block)
{
    u32 random = mix(run->issued ^ mix(run->read_number ^ 0x5bd1e995u));

    *block = random >> 8 & (run->area.blocks - 1);
    return random % 100 < run->load.read_percent;
}

static int affordable(struct run *run)
{
    u32 passed = ticks - run->last_tick, most;

    if (!run->load.rate)
        return 1;
    run->last_tick += passed;
    run->credit += (passed < LONGEST_SLEEP ? passed : LONGEST_SLEEP) * run->load.rate;
    most = run->load.rate * 10 + CREDIT_REQUEST;
    if (run->credit > most)
        run->credit = most;
    return run->credit >= CREDIT_REQUEST;
}

static int all_issued(struct run *run)
{
    return run->stopping || (run->load.total && run->issued >= run->load.total);
}

static struct request *take(struct run *run, u32 block, u32 sequence)
{
    struct request *request;

    if (requests_idle() < 2)        /* the last one is for commands */
        return 0;
    request = request_take(run->disk);
    request->run = run;
    request->block = block;
    request->sequence = sequence;
    run->in_flight++;
    return request;
}

static int issue_flush(struct run *run)
{
    struct request *request;

    if (!run->flush_due || run->flushing || run->stopping || !(request = take(run, 0, run->acked)))
        return 0;
    run->flush_due = 0;
    run->flushing = 1;
    request_submit(request, FLUSH, 0, 0);
    return 1;
}

/* Whether the others of its group let this run issue a write; the first waits for all to begin. */
static int in_step(struct run *run, u32 sequence)
{
    for (u32 i = 0; i < DISKS; i++)
        if (run->load.group >> i & 1 && ((!run->issued && !runs[i].on) ||
                                         sequence > runs[i].acked + run->load.depth))
            return 0;
    return 1;
}

/* Issues the next read or write; 0: not now. */
static int issue(struct run *run)
{
    struct request *request;
    u32 block, sequence = run->issued + 1;
    int reading;

    if (all_issued(run) || run->in_flight - run->flushing >= run->load.depth || !affordable(run))
        return 0;
    reading = next_is_read(run, &block);
    if (!reading) {
        if (run->issued - run->acked >= WINDOW - 1 || sequence >= BUSY || !in_step(run, sequence))
            return 0;
        block = mix(sequence ^ run->load.seed) & (run->area.blocks - 1);
    }
    if (run->table[block] & BUSY || !(request = take(run, block, sequence)))
        return 0;
    run->table[block] |= BUSY;
    run->credit -= run->load.rate ? CREDIT_REQUEST : 0;
    if (reading) {
        run->read_number++;
    } else {
        run->issued = sequence;
        for (u32 i = 0; i < run->area.block_sectors; i++)
            stamp(request_buffer(request) + i * SECTOR / 4, lba_of(run, block) + i, sequence,
                  run->load.seed);
        if (run->load.flush_every && sequence % run->load.flush_every == 0)
            run->flush_due = 1;
    }
    request_submit(request, reading ? READ : WRITE, lba_of(run, block), run->area.block_sectors);
    return 1;
}

static int finished(struct run *run)
{
    return all_issued(run) && !run->in_flight && (!run->flush_due || run->stopping);
}

static int step(struct run *run)
{
    int did = 0;

    while (issue_flush(run) || issue(run))
        did = 1;
    if (!finished(run))
        return did;
    run->on = 0;
    ticks_as_needed();
    put("*DONE");
    put_field("disk", run->disk - disks);
    put_field("issued", run->issued);
    put_field("acked", run->acked);
    put_field("flushed", run->flushed);
    put_field("reads", run->reads);
    put_field("bad", run->bad);
    put_field("errors", run->errors);
    put_char('\n');
    return 1;
}

int stress_step(void)
{
    int did = 0;

    for (u32 i = 0; i < DISKS; i++)
        if (runs[i].on)
            did |= step(&runs[i]);
    return did;
}

void stress_stop(struct disk *disk)
{
    disk->run->stopping = 1;
    while (disk->run->on)
        work(0);
}

static u64 waiting(struct run *run)
{
    u64 now = clock_now();

    return clock_microseconds(now - requests_oldest(run, now));
}

void stress_progress(struct disk *disk)
{
    struct run *run = disk->run;

    put_field("running", run->on);
    put_field("issued", run->issued);
    put_field("acked", run->acked);
    put_field("flushed", run->flushed);
    put_field("reads", run->reads);
    put_field("bad", run->bad);
    put_field("errors", run->errors);
    put_field("waiting_us", waiting(run));
    if (run->errors)
        put_field("status", run->first_error);
    if (run->bad) {
        put_field("bad_lba", run->bad_lba);
        put_field("bad_found", run->bad_found);
        put_field("bad_expected", run->bad_expected);
    }
}

void stress_latency(struct disk *disk)
{
    struct run *run = disk->run;

    put_field("requests", run->latency_count);
    put_field("mean_us", run->latency_count ? divide(run->latency_sum, run->latency_count, 0) : 0);
    put_field("longest_us", run->latency_longest);
    put_field("waiting_us", waiting(run));
    run->latency_sum = run->latency_longest = 0;
    run->latency_count = 0;
}

u32 stress_check(struct disk *disk, u32 *checked, u32 *bad, u64 *lba)
{
    struct run *run = disk->run;

    *checked = *bad = 0;
    for (u32 block = 0; block < run->area.blocks; block++) {
        u32 expected = run->table[block], status;
        struct request *request;

        if (!expected)
            continue;
        request = request_await(disk);
        *lba = lba_of(run, block);
        request_submit(request, READ, *lba, run->area.block_sectors);
        status = request_wait(request);
        if (!status && !block_right(run, block, expected, request_buffer(request))) {
            ++*bad;
            run->bad++;             /* so that `progress` tells the first */
        }
        request_release(request);
        if (status)
            return status;
        ++*checked;
    }
    return 0;
}
