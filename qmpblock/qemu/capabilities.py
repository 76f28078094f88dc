"""What this QEMU can do safely, asked by name.

What a QEMU has, its schema tells. What no schema shows, because it is a defect and not a
feature, is gated here, by version, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmpblock.errors import UNTOUCHED, UnsupportedError

__all__ = ["Capabilities"]

_OLDEST = (7, 2, 0)


@dataclass(frozen=True)
class Capabilities:
    """Capabilities of one QEMU.

    :ivar version: major, minor, micro.
    """

    version: tuple[int, int, int]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))

    def check_supported(self) -> None:
        """Refuse a QEMU that nothing here was tried on.

        :raise UnsupportedError: it is older than 7.2.
        """
        if self.version < _OLDEST:
            raise UnsupportedError(
                f"QEMU {self} is older than 7.2, the oldest that qmpblock supports",
                standing=UNTOUCHED,
            )

    @property
    def nbd_clients_endanger_iothreads(self) -> bool:
        """Whether an NBD client of a node in an iothread can make QEMU abort.

        Two defects. One that goes away does (K1): 7.2 aborts; 10.0.13 and 11.1.3
        do not. And one that is connected while the guest resets its virtio-blk disk: 22 of 64
        quick resets of 7.2.22 ended in `blk_aio_attached: Assertion
        client->recv_coroutine == NULL`, because a receive coroutine that the end of one drain
        scheduled had not run when the next drain polled; reworked upstream for 9.0. What lies
        between 7.2 and 10.0 was not run and counts as affected.
        """
        return self.version < (10, 0, 0)

    @property
    def pivots_abort_under_queued_writes(self) -> bool:
        """Whether a pivot onto a raw or LUKS image aborts where a write of the guest waits in QEMU.

        Measured (K26): 7.2.22 does, 11.1.2 does not. What lies between counts as affected.
        """
        return self.version < (10, 0, 0)

    @property
    def channels_hang(self) -> bool:
        """Whether a source can hang for ever where several channels of its memory end (K38).

        Seen: 7.2.22, in 2 of 5; 11.1.2 in none of 36. What lies below 10.0 counts as affected.
        """
        return self.version < (10, 0, 0)

    @property
    def moves_below_filters_hang_iothreads(self) -> bool:
        """Whether a mirror that replaces a node below a filter hangs QEMU where iothreads are.

        Measured (K27): 7.2.22 hangs at job-finalize of the first one, 11.1.2 does not.
        """
        return self.version < (10, 0, 0)

    @property
    def polling_forgets_queues(self) -> bool:
        """Whether a drain can make an iothread that polls forget a virtio-blk disk's requests.

        The guest then waits for ever (K9). Measured: 7.2.22 does, 6 of 8 pivots
        that were arranged for it; 11.1.2 does not, 40 of 40. By the code 7.0 to 8.0 do, and
        8.1 has a defect of its own in the same place, cured in 9.0.
        """
        return self.version < (10, 0, 0)

    @property
    def adding_over_iothreads_aborts(self) -> bool:
        """Whether a node cannot be added over one that is at work in an iothread.

        See `qmpblock.qemu.joint`. Measured: 7.2.22 aborts, 11.1.2 does not; between was not run.
        """
        return self.version < (10, 0, 0)

    @property
    def nbd_server_stop_hangs_in_handshake(self) -> bool:
        """Whether nbd-server-stop never returns while a client's handshake is incomplete.

        Measured: 7.2.22 hangs, with the guest; 10.0.13 and 11.1.2 do not.
        """
        return self.version < (10, 0, 0)

    @property
    def nbd_handshake_limit_can_be_lifted(self) -> bool:
        """Whether nbd-server-start takes `handshake-max-seconds`.

        Every QEMU from 7.2.14 on ends a connection whose handshake takes ten seconds, which it
        does where the host is busy enough. The schema tells, too, but takes 0.3 s to read.
        """
        return self.version >= (10, 0, 0)

    @property
    def copy_on_read_breaks_subclusters(self) -> bool:
        """Whether copy-on-read into a qcow2 image with subclusters can make QEMU abort.

        Measured on 7.2.22, 7 of 7 streams, and by qemu-io -C: where a cluster holds its first
        subclusters and not the others, `bdrv_co_do_copy_on_readv: Assertion skip_bytes <
        pnum`. NBD_CMD_CACHE is a copy-on-read, too. 10.0.13 and 11.1.2 do not.
        """
        return self.version < (10, 0, 0)

    @property
    def concluded_streams_kill(self) -> bool:
        """Whether query-named-block-nodes makes QEMU crash while a stream job is concluded.

        Measured on 7.2.22, 15 of 15, finalized or cancelled: a job that is not dismissed keeps
        its copy-on-read filter, which has no child any more, and bdrv_refresh_filename follows
        it. So a stream job must dismiss itself there. 10.0.13 and 11.1.2 do not crash.
        """
        return self.version < (10, 0, 0)

    @property
    def flushes_break_over_ending_jobs(self) -> bool:
        """Whether a job that ends while QEMU flushes all disks leaves its filter there (K34).

        Measured: 7.2.22 does, mirrors, commits of the active layer, streams into it and backups of
        it; 11.1.2 does not. What lies between counts as affected.
        """
        return self.version < (10, 0, 0)

    @property
    def create_jobs_endanger_queries(self) -> bool:
        """Whether anybody's query-named-block-nodes can make QEMU abort during a create job.

        While blockdev-create opens the qcow2 image that it has just made, in a coroutine that
        yields, the node is there and its header is not read yet: `qcow2_get_specific_info:
        Assertion false` (K11). 7.2.22 dies within 1 or 2 snapshots under tight polling;
        10.0.13 (48 snapshots) and 11.1.3 do not. blockdev-add and blockdev-reopen are no jobs,
        and no other command runs meanwhile; blockdev-create of a plain file opens no node.
        """
        return self.version < (10, 0, 0)

    @property
    def jobs_misread_views(self) -> bool:
        """Whether a job that reads a snapshot-access node may get what was written later.

        Measured (K23): of mirrors of such a node, under a guest's writes, 4 of 80 held a write from
        after the point on 7.2.22, without an error; none on 10.0.13 and 11.1.2. It is the same
        defect.
        """
        return self.views_misread

    @property
    def views_misread(self) -> bool:
        """Whether a snapshot-access node shows the disk as it is now, where it should not (K37).

        To whoever reads from what was kept beyond it, at once, and in block status: always on
        7.2.22, never on 10.0.13 and 11.1.2. hbitmap_status() said that what it had found dirty was
        not, unless all was; cured upstream for 8.0. What lies between counts as affected.
        """
        return self.version < (10, 0, 0)

    @property
    def mirrors_give_zeros_back(self) -> bool:
        """Whether a mirror has a qcow2 target free what it writes zeros to (F27).

        With discard=ignore of the target, too: 7.2.22 does, 11.1.2 does not. What lies between
        counts as affected.
        """
        return self.version < (10, 0, 0)

    @property
    def mirrors_leave_out_zeros(self) -> bool:
        """Whether a mirror writes no zeros where its target reads as zeros already.

        So what is a hole there stays one. Measured: 11.1.2 does that, to an NBD export whose image
        is sparse, with discard=ignore of all nodes; 7.2.22 writes them all. What lies between
        counts as affected.
        """
        return self.version >= (8, 0, 0)

    @property
    def mirrors_take_word_of_zeros(self) -> bool:
        """Whether blockdev-mirror takes `target-is-zero`: 10.1 and newer (F36).

        The schema tells, too, but takes 0.3 s to read.
        """
        return self.version >= (10, 1, 0)

    @property
    def lists_values(self) -> bool:
        """Whether `qom-list-get` tells all properties of objects at once: 10.1 and newer.

        Where it is missing all the same, whoever asks hears so, and asks for one after the other.
        """
        return self.version >= (10, 1, 0)

    @property
    def overlapping_reads_of_views_abort(self) -> bool:
        """Whether two reads of one range of a snapshot-access node, at once, make QEMU abort.

        `reqlist_init_req: Assertion !reqlist_find_conflict(reqs, offset, bytes)` (K22). Cured
        upstream in 9.2, and in 9.1.1, 8.2.8 and 7.2.15; 7.2.22, 10.0.13 and 11.1.2 were run.
        """
        cured = ((7, 2, 15), (8, 2, 8), (9, 1, 1))
        return self.version < (9, 2, 0) and not any(
            self.version[:2] == release[:2] and self.version >= release for release in cured
        )
