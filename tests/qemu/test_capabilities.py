"""Version gates."""

import pytest

from qmpblock.errors import UnsupportedError
from qmpblock.qemu.capabilities import Capabilities


@pytest.mark.parametrize("version", [(2, 12, 0), (7, 1, 9)])
def test_too_old_is_refused(version):
    with pytest.raises(UnsupportedError, match=r"older than 7\.2"):
        Capabilities(version).check_supported()


@pytest.mark.parametrize("version", [(7, 2, 0), (11, 1, 3)])
def test_supported(version):
    Capabilities(version).check_supported()


@pytest.mark.parametrize(
    ("version", "affected"),
    [((7, 2, 22), True), ((9, 2, 4), True), ((10, 0, 0), False), ((11, 1, 2), False)],
)
def test_defects_are_gated(version, affected):
    """What was not run (7.2 to 10.0) counts as affected."""
    capabilities = Capabilities(version)
    assert capabilities.nbd_clients_endanger_iothreads is affected
    assert capabilities.nbd_server_stop_hangs_in_handshake is affected
    assert capabilities.copy_on_read_breaks_subclusters is affected
    assert capabilities.concluded_streams_kill is affected
    assert capabilities.flushes_break_over_ending_jobs is affected
    assert capabilities.polling_forgets_queues is affected
    assert capabilities.adding_over_iothreads_aborts is affected
    assert capabilities.create_jobs_endanger_queries is affected
    assert capabilities.jobs_misread_views is affected
    assert capabilities.pivots_abort_under_queued_writes is affected
    assert capabilities.moves_below_filters_hang_iothreads is affected
    assert capabilities.mirrors_give_zeros_back is affected
    assert capabilities.views_misread is affected
    assert capabilities.channels_hang is affected
    assert capabilities.nbd_handshake_limit_can_be_lifted is not affected


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((7, 2, 14), True),
        ((7, 2, 15), False),
        ((7, 2, 22), False),
        ((8, 1, 9), True),
        ((8, 2, 7), True),
        ((8, 2, 8), False),
        ((9, 0, 9), True),
        ((9, 1, 0), True),
        ((9, 1, 1), False),
        ((9, 2, 0), False),
        ((11, 1, 2), False),
    ],
)
def test_a_defect_that_was_cured_in_old_branches_too(version, affected):
    assert Capabilities(version).overlapping_reads_of_views_abort is affected


def test_mirrors_leave_out_zeros_on_newer_ones():
    assert not Capabilities((7, 2, 22)).mirrors_leave_out_zeros
    assert Capabilities((8, 0, 0)).mirrors_leave_out_zeros
    assert Capabilities((11, 1, 2)).mirrors_leave_out_zeros


def test_mirrors_are_told_of_zeros_on_newer_ones():
    assert not Capabilities((10, 0, 13)).mirrors_take_word_of_zeros
    assert Capabilities((10, 1, 0)).mirrors_take_word_of_zeros
    assert Capabilities((11, 1, 2)).mirrors_take_word_of_zeros


def test_values_are_listed_on_newer_ones():
    assert not Capabilities((10, 0, 13)).lists_values
    assert Capabilities((10, 1, 0)).lists_values


def test_every_gate_is_tested_above():
    """A new one must not be forgotten there."""
    gates = {name for name, what in vars(Capabilities).items() if isinstance(what, property)}
    tests = (
        test_defects_are_gated,
        test_a_defect_that_was_cured_in_old_branches_too,
        test_mirrors_leave_out_zeros_on_newer_ones,
        test_mirrors_are_told_of_zeros_on_newer_ones,
        test_values_are_listed_on_newer_ones,
    )
    assert gates == {name for test in tests for name in test.__code__.co_names} & gates


def test_it_names_its_version():
    assert str(Capabilities((7, 2, 22))) == "7.2.22"
