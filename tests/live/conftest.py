"""This project's live tests: every VM of `start_qemu` must end as it began.

Some tests run over every scenario and every case, which takes an hour for one QEMU. A run takes a
sample of them, at least one of each function; QMPBLOCK_SEED chooses it, which tools/run_tests.py
takes from what is committed. Where a run has several QEMUs (QMPBLOCK_TURN says which of how many
this is), it deals out among them, by the same seed, the cases of each function, and what shows the
same on each: any of these runs on one, but where it says itself which QEMUs it is for. `make soak`
deals all cases out among its slices (QMPBLOCK_SLICE), and QMPBLOCK_WHOLE=1 runs them all.
"""

from __future__ import annotations

import os
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hosts import host, land, ssh_host  # noqa: F401  # fixtures
from libvirthost import libvirt  # noqa: F401  # a fixture
from migrating import begin  # noqa: F401  # a fixture
from otherusers import eve  # noqa: F401  # a fixture
from pointing import in_memory  # noqa: F401  # a fixture
from ports import free_ports

from qmpblock.chains import headers
from qmpblock.testing.images import BuiltScenario, Tools, build
from qmpblock.testing.scenario import parse_scenario

HERE = Path(__file__).parent

#: What share of a function's cases a run takes, by module, or by module and function.
SHARES = {
    "test_ahead": 0.15,
    "test_allocate": 0.06,
    "test_allocate_full": 0.05,
    "test_allocate_kills": 0.2,
    "test_allocate_proof": 0.5,
    "test_ansible::test_a_target": 0.13,
    "test_attacks::test_a_recovery_that_died_when_it_had_taken_a_lock_over": 0.34,
    "test_attacks::test_an_unknown_outcome_is_undone": 0.2,
    "test_backup_decisions": 0.34,
    "test_backup_edges::test_an_encrypted_disk": 0.5,
    "test_backup_kills": 0.34,
    "test_backup_lower": 0.34,
    "test_between": 0.2,
    "test_chains": 0.03,
    "test_commands::test_a_closed_image_maps_as_qemu_img_says": 0.13,
    "test_copy::test_a_file_that_comes_to_bear_the_name_meanwhile": 0.5,
    "test_copy::test_every_disk": 0.03,
    "test_copy::test_the_top_alone": 0.25,
    "test_copy::test_what_nobody_wrote_to_takes_no_space": 0.5,
    "test_copy_command::test_a_wrong_request_touches_nothing": 0.5,
    "test_copy_device::test_an_image_on_a_device": 0.34,
    "test_copy_device::test_to_a_device": 0.5,
    "test_copy_disturbed": 0.12,
    "test_copy_dry_run": 0.3,
    "test_copy_kills": 0.2,
    "test_copy_latency": 0.34,
    "test_copy_shape": 0.13,
    "test_copy_wire": 0.34,
    "test_detect_zeroes": 0.3,
    "test_drawings": 0.06,
    "test_export::test_a_busy_host_does_not_end_a_handshake": 0.5,
    "test_export::test_the_guest_goes_away_in_the_middle": 0.17,
    "test_export_command": 0.34,
    "test_export_tools": 0.5,
    "test_fdset": 0.5,
    "test_filling::test_what_lies_beside_the_ranges_stays_to_be_seen": 0.5,
    "test_harness::test_every_scenario_boots_and_its_images_verify": 0.15,
    "test_harness::test_the_invariant_finds_a_leak": 0.2,
    "test_harness::test_the_same_writes_without_a_guest": 0.25,
    "test_headers::test_a_key_is_handed_on_and_never_shown": 0.25,
    "test_headers::test_a_key_that_cannot_be_had": 0.3,
    "test_headers::test_it_is_what_a_create_job_makes": 0.4,
    "test_incoming::test_the_guest_sees_what_was_written_before_it_came": 0.5,
    "test_identity::test_a_moved_chain_opens": 0.5,
    "test_identity::test_an_image_that_is_not_under_its_name_any_more": 0.4,
    "test_identity::test_an_image_that_is_on_this_host_is_found": 0.5,
    "test_identity::test_two_disks_over_one_file_that_is_open_twice": 0.2,
    "test_intruding::test_what_is_meant_is_the_active_layer": 0.4,
    "test_interrupted_late::test_what_is_done_is_told_as_done": 0.3,
    "test_job_commands": 0.2,
    "test_job_control": 0.13,
    "test_job_faults": 0.2,
    "test_job_refusals::test_an_overlay_over_an_encrypted_disk_holds_no_plaintext": 0.5,
    "test_job_refusals::test_read_only_storage_is_refused": 0.5,
    "test_job_refusals::test_what_would_store_plaintext_is_refused": 0.6,
    "test_killing": 0.3,
    "test_layer_readers": 0.34,
    "test_libvirt_between": 0.5,
    "test_libvirt_chains::test_the_controller_is_killed": 0.5,
    "test_libvirt_kills": 0.5,
    "test_libvirt_migrate": 0.67,
    "test_map::test_every_scenario_maps_as_qemu_img_and_nbdinfo_do": 0.13,
    "test_map::test_every_scenarios_disks_and_layers": 0.15,
    "test_opened::test_both_die_in_the_window": 0.3,
    "test_opened::test_it_is_opened_so_for_its_map_too": 0.4,
    "test_other_versions::test_a_dead_controllers_lock": 0.5,
    "test_outside::test_its_own_tests": 0.34,
    "test_outside::test_its_tool_with_strict_types": 0.5,
    "test_migrate::test_every_kind_of_disk": 0.1,
    "test_migrate::test_the_command_is_interrupted_as_the_guest_goes": 0.34,
    "test_migrate_back::test_broken_off": 0.13,
    "test_migrate_back::test_the_destination_dies": 0.07,
    "test_migrate_back::test_the_destination_falls_silent": 0.13,
    "test_migrate_back::test_the_memory_alone_is_broken_off": 0.25,
    "test_migrate_daemon::test_an_encrypted_image": 0.5,
    "test_migrate_itself::test_after_kill_9": 0.17,
    "test_migrate_itself::test_it_stays_so_at_the_source": 0.67,
    "test_migrate_itself::test_one_that_powers_off_ends_it": 0.5,
    "test_migrate_meanwhile::test_a_medium_that_is_exchanged_while_the_memory_is_sent": 0.34,
    "test_migrate_pause::test_after_kill_9": 0.4,
    "test_migrate_pause::test_by_every_way": 0.34,
    "test_migrate_pause::test_it_goes_on_at_the_source": 0.4,
    "test_migrate_daemon::test_every_kind_of_disk": 0.5,
    "test_migrate_daemon::test_the_daemon_dies": 0.5,
    "test_migrate_daemon::test_the_daemon_falls_silent": 0.25,
    "test_migrate_daemon::test_the_destination_dies": 0.25,
    "test_migrate_daemon_ssh::test_it_serves_there": 0.5,
    "test_migrate_daemon_ssh::test_no_key_is_handed_on": 0.5,
    "test_migrate_daemon_ssh::test_one_dies": 0.09,
    "test_migrate_daemon_ssh::test_the_controller_dies": 0.5,
    "test_migrate_daemon_ssh::test_what_was_mirrored_is_not_mirrored_again": 0.25,
    "test_migrate_ssh::test_ssh_is_killed": 0.13,
    "test_migrate_ssh::test_the_controller_dies_and_is_recovered": 0.34,
    "test_migrate_ssh::test_the_controller_dies_and_the_wire_is_cut": 0.13,
    "test_migrate_ssh::test_the_wire_is_cut": 0.13,
    "test_migration_again::test_what_was_mirrored_is_not_mirrored_again": 0.25,
    "test_migration_again::test_where_a_lock_cannot_be_written_none_is_kept": 0.5,
    "test_migration_kills::test_another_shape_struck_at_some_command": 0.34,
    "test_migration_kills::test_somebody_else_at_some_command": 0.5,
    "test_migration_kills::test_who_has_the_guest": 0.1,
    "test_migrate_stopped::test_after_kill_9": 0.17,
    "test_migrate_stopped::test_it_stays_stopped_at_the_destination": 0.34,
    "test_migrate_stopped::test_it_stays_stopped_at_the_source": 0.5,
    "test_migrate_tls::test_the_wire_is_cut": 0.25,
    "test_migrate_tls::test_what_does_not_go_together_is_refused_before_anything_is_copied": 0.5,
    "test_migration_kills": 0.2,
    "test_migration_recovery": 0.2,
    "test_ownership::test_qemu_migrates_nothing_while_we_change_it": 0.4,
    "test_ownership::test_where_qemu_cannot_be_held_the_migration_goes_first": 0.34,
    "test_point_kills": 0.34,
    "test_points::test_every_disk_as_it_was": 0.12,
    "test_points_disturbed": 0.34,
    "test_policy": 0.026,
    "test_privileges": 0.2,
    "test_proof": 0.25,
    "test_queued_writes::test_a_commit_while_writes_wait_in_qemu": 0.2,
    "test_read_only::test_a_disk_for_reading_only_is_not_written": 0.5,
    "test_resume": 0.34,
    "test_resume_end::test_it_goes_on_from_what_a_death_left": 0.34,
    "test_secrets": 0.34,
    "test_settings": 0.25,
    "test_snapshots::test_names_and_formats": 0.17,
    "test_spawn::test_images_have_host_space_for_every_byte": 0.5,
    "test_spawn::test_a_key_is_never_shown": 0.5,
    "test_spawn::test_it_is_the_same_machine_and_takes_it_over": 0.3,
    "test_spawn::test_its_disks_come_along": 0.34,
    "test_staging::test_an_interrupt_at_any_command_brings_the_overlay_home": 0.5,
    "test_streams::test_all_that_was_streamed_survives_qemus_death": 0.5,
    "test_streams::test_what_a_short_layer_hides_stays_hidden": 0.5,
    "test_unsound::test_a_corrupt_image_is_not_written": 0.5,
    "test_verify::test_an_image_in_use_is_refused_on_either_side": 0.5,
    "test_verify::test_an_image_that_another_users_vm_writes_to": 0.5,
    "test_verify::test_every_scenario_equals_its_copy_until_a_byte_differs": 0.08,
}

#: What is shown there is the command, the harness or the pages, and what they do with whatever
#: QEMU, or it takes long and is the same on each: of these modules and functions, a run takes each
#: case on one of its QEMUs.
EITHER = (
    "test_ahead::test_a_growing_image_never_runs_out",
    "test_ahead::test_full_allocation_goes_on_meanwhile",
    "test_ahead::test_raw_written_from_its_start",
    "test_ahead::test_writes_far_above_the_room_make_no_storm",
    "test_ahead_policy",
    "test_allocate::test_a_speed_holds_and_can_be_changed",
    "test_allocate_kills",
    "test_allocate_proof",
    "test_ansible",
    "test_architecture",
    "test_attacks",
    "test_backup::test_increments_hold_the_instant",
    "test_backup::test_it_is_tested_and_restored_without_the_vm",
    "test_backup_command",
    "test_backup_decisions",
    "test_backup_dry_run::test_the_command",
    "test_backup_dry_run::test_what_is_said_is_made",
    "test_backup_edges::test_a_vm_that_has_migrated_goes_on",
    "test_backup_edges::test_an_encrypted_disk",
    "test_backup_elsewhere::test_on_another_host",
    "test_backup_interrupted",
    "test_backup_kills",
    "test_backup_lower",
    "test_believed",
    "test_bench",
    "test_commands",
    "test_copies_policy",
    "test_copy::test_what_somebody_has_open_is_never_replaced",
    "test_copy_command",
    "test_copy_disturbed::test_somebodys_job_keeps_an_overlay_from_coming_home",
    "test_copy_dry_run",
    "test_copy_kills",
    "test_copy_latency",
    "test_copy_shape",
    "test_copy_wire::test_a_server_that_stops_answering",
    "test_copy_wire::test_a_server_that_stops_answering_at_the_end",
    "test_copy_wire::test_a_server_that_stops_answering_while_the_vm_is_paused",
    "test_copy_wire::test_a_slow_server",
    "test_copy_wire::test_a_wire_that_is_cut",
    "test_copy_wire::test_a_wire_that_is_cut_while_what_is_there_is_compared",
    "test_copy_wire::test_a_wire_that_is_mended_in_time",
    "test_copy_wire::test_a_wire_that_takes_a_megabyte_a_second",
    "test_copy_wire::test_credentials_of_a_controller_that_is_killed",
    "test_copy_wire::test_over_tcp_and_with_tls",
    "test_daemon",
    "test_drawings",
    "test_elsewhere",
    "test_export::test_a_guest_that_writes_is_not_disturbed",
    "test_export::test_tls_over_tcp",
    "test_export_command",
    "test_export_tools",
    "test_handed",
    "test_hang",
    "test_harness",
    "test_headers::test_others_may_ask_while_space_is_reserved",
    "test_identity",
    "test_job_commands",
    "test_job_control::test_a_speed_at_which_it_never_gets_there_is_told_of",
    "test_job_control::test_hung_storage_is_a_stall_and_owed_until_it_answers",
    "test_job_control::test_resting_to_keep_within_its_speed_is_no_stall",
    "test_job_control::test_slowing_the_guest_down_may_not_suffice",
    "test_job_control::test_without_convergence_it_says_so_and_undoes",
    "test_job_faults::test_a_qemu_that_does_not_answer_is_undone_when_it_does",
    "test_job_faults::test_after_a_cut_it_connects_again_and_undoes",
    "test_job_faults::test_where_it_cannot_connect_again_it_says_how_to_recover",
    "test_job_faults::test_without_room_a_job_waits_and_goes_on",
    "test_job_refusals::test_an_overlay_over_an_encrypted_disk_holds_no_plaintext",
    "test_job_refusals::test_what_would_store_plaintext_is_refused",
    "test_killing",
    "test_libvirt",
    "test_libvirt_between::test_a_controller_killed_in_between",
    "test_libvirt_between::test_a_snapshot_in_between",
    "test_libvirt_chains",
    "test_libvirt_commands",
    "test_libvirt_commit",
    "test_libvirt_copy",
    "test_libvirt_full",
    "test_libvirt_kills",
    "test_libvirt_migrate::test_by_what_is_said",
    "test_libvirt_shared",
    "test_linux",
    "test_lock",
    "test_managed",
    "test_map::test_a_chain_of_150_layers",
    "test_metrics",
    "test_migrate::test_the_command",
    "test_migrate::test_the_command_is_interrupted",
    "test_migrate::test_the_command_is_interrupted_as_the_guest_goes",
    "test_migrate_daemon_ssh",
    "test_migrate_itself",
    "test_migrate_linux::test_a_file_system_and_a_growing_log",
    "test_migrate_list",
    "test_migrate_means::test_a_guest_that_outruns_the_mirrors",
    "test_migrate_means::test_a_longer_standstill_lets_a_busy_guest_over",
    "test_migrate_pause",
    "test_migrate_ssh",
    "test_migrate_stopped",
    "test_migrate_tls",
    "test_migration_again",
    "test_migration_bitmaps::test_the_dry_run_names_them",
    "test_migration_dry_run",
    "test_migration_kills",
    "test_migration_layers::test_over_a_copy_of_the_backing_image_on_the_users_word",
    "test_migration_recovery::test_of_two_recoveries_at_once_one_wins",
    "test_migration_report",
    "test_migration_room",
    "test_migration_space",
    "test_migration_sparse::test_two_tib_of_nothing",
    "test_migration_wire::test_a_destination_that_falls_silent_holds_nobody",
    "test_migration_wire::test_a_slow_wire_is_found_to_be_slow",
    "test_migration_wire::test_a_wire_that_is_long_is_found_to_be_long",
    "test_monitors",
    "test_other_versions",
    "test_outside",
    "test_ownership::test_a_watch_waits_for_how_a_migration_ends",
    "test_point_kills",
    "test_points::test_what_is_kept_of_an_encrypted_disk_is_encrypted",
    "test_points_disturbed",
    "test_policy",
    "test_polling::test_a_guest_that_another_tool_has_hung_is_woken",
    "test_polling::test_without_the_guard_it_does",
    "test_privileges",
    "test_proof",
    "test_proxmox",
    "test_queued_writes::test_a_controller_killed_around_the_pause",
    "test_reach",
    "test_read_only::test_a_policy_for_it_is_refused",
    "test_recipes",
    "test_resume",
    "test_resume_targets",
    "test_rounds",
    "test_secrets",
    "test_snapshots::test_an_encrypted_disks_overlay_holds_no_plaintext",
    "test_staging::test_slices_and_speed",
    "test_tiny_guest",
    "test_traced",
    "test_untrusted",
    "test_verify",
    "test_vms",
    "test_wheel",
    "test_wire::test_a_slow_server_is_not_taken_for_a_stalled_one",
    "test_your_tool",
)


@pytest.fixture(autouse=True)
def _every_vm_ends_as_it_began(request: pytest.FixtureRequest) -> None:
    if "start_qemu" in request.fixturenames:
        request.getfixturevalue("invariant")


@pytest.fixture(autouse=True)
def _keys_of_little_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derive keys in milliseconds: the default, two seconds each time, is for secrets."""
    monkeypatch.setitem(headers._LUKS, "encrypt.iter-time", 10)


THREE_LAYERS = """\
about: Three layers, each with data where no other has some.
images:
  - {size: 16M, content: [write 0 1M 0xaa]}
  - {content: [write 1M 1M 0xbb]}
  - {content: [write 2M 1M 0xcc]}
"""


@pytest.fixture
def build_images(
    vm_dir: Path, qemu_binary: str
) -> Callable[..., Coroutine[Any, Any, BuiltScenario]]:
    """Return what builds the images of a scenario's text: three layers, if none is given."""

    async def built(text: str = THREE_LAYERS) -> BuiltScenario:
        return await build(parse_scenario(text, "text"), vm_dir / "images", Tools.of(qemu_binary))

    return built


@pytest.fixture
def free_port() -> int:
    """Return a TCP port of this host that nobody has, and the kernel gives to nobody."""
    return free_ports()


def seed() -> int:
    """Return the seed of the sample; the same in every process of a run, or they would differ."""
    given = os.environ.get("QMPBLOCK_SEED")
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return int(given) if given else zlib.crc32(run.encode()) if run else _SEED


_SEED = random.SystemRandom().getrandbits(32)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the sample, or not in this slice of a soak."""
    ours = [item for item in items if item.path.parent == HERE]
    place = os.environ.get("QMPBLOCK_SLICE")
    if os.environ.get("QMPBLOCK_WHOLE") or (not ours):
        return
    if place:
        number, slices = map(int, place.split("/"))
        left = {item for at, item in enumerate(ours) if at % slices != number}
    else:
        left = _not_sampled(ours)
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


def _not_sampled(ours: list[pytest.Item]) -> set[pytest.Item]:
    functions = defaultdict(list)
    for item in ours:
        function = item.nodeid.partition("[")[0].rpartition("::")[2]
        functions[item.path.stem, function].append(item)
    turn, qemus = map(int, os.environ.get("QMPBLOCK_TURN", "0/1").split("/"))
    chance = random.Random(seed())
    left: set[pytest.Item] = set()
    for (module, function), items in functions.items():
        name = f"{module}::{function}"
        share = SHARES.get(name, SHARES.get(module, 1.0))
        taken = chance.sample(items, max(1, round(share * len(items))))
        first = chance.randrange(qemus)
        if {module, name} & set(EITHER) or len(items) > 1:
            bound = [item for item in taken if next(item.iter_markers("needs_qemu"), None)]
            free = [item for item in taken if item not in bound]
            taken = bound + free[(first + turn) % qemus :: qemus]
        left.update(set(items) - set(taken))
    return left
