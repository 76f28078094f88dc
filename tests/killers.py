"""What the tests of kill matrices share: a matrix gone through whole, or a seeded sample of it.

All slices of `make soak` together try every point (`rounds.slice_of_soak`).
"""

from killing import MOMENTS, WAYS, Matrix
from rounds import rounds, slice_of_soak


async def kill_controllers(operation, way, directory, qemu):
    """Kill a controller before and after each command, and go on."""
    chosen, tried, total = slice_of_soak(), 0, 0
    async with Matrix(operation, directory, qemu) as matrix:
        for number, moment in matrix.points(slow=way.endswith("-slow")):
            total += 1
            if chosen(total):
                tried += await matrix.killed_controller(number, moment, way)
    print(f"kill matrix: {tried} of {total} points, {operation}, then {way}")


async def kill_recoveries(operation, way, directory, qemu):
    """Kill a controller at each stage, then its recovery before and after each command."""
    chosen, tried, total = slice_of_soak(), 0, 0
    async with Matrix(operation, directory, qemu) as matrix:
        for first in matrix.representative():
            trace = await matrix.recovery_trace(first, way)
            for number in range(1, len(trace) + 1):
                for moment in MOMENTS:
                    total += 1
                    if chosen(total):
                        tried += await matrix.killed_recovery(first, number, moment, way)
    print(f"kill matrix: {tried} of {total} points, recovery ({way}) of {operation}")


async def recover_by_two(operation, ways, directory, qemu):
    """Kill a controller before and after each command, and have two others go on at once."""
    chosen, tried, total = slice_of_soak(), 0, 0
    async with Matrix(operation, directory, qemu) as matrix:
        for number, moment in changing(matrix):
            total += 1
            if chosen(total):
                tried += await matrix.recovered_by_two(number, moment, ways)
    print(f"kill matrix: {tried} of {total} points, {operation}, then {' and '.join(ways)} at once")


async def kill_qemus(operation, death, directory, qemu):
    """Kill QEMU before and after each command, its controller with it or not."""
    chosen, tried, total = slice_of_soak(), 0, 0
    async with Matrix(operation, directory, qemu) as matrix:
        for number, moment in matrix.points():
            total += 1
            if chosen(total):
                tried += await matrix.killed_qemu(number, moment, death)
    print(f"kill matrix: {tried} of {total} points, {operation}, QEMU killed ({death})")


async def kill_some(operation, points, deaths, count, directory, qemu):
    """Kill a controller, or QEMU, at some of a matrix's points; return of how many.

    :param points: returns those to choose from.
    """
    _, chance = rounds(1)
    tried = 0
    async with Matrix(operation, directory, qemu) as matrix:
        among = list(points(matrix))
        kills = [(matrix.killed_controller, point, way) for point in among for way in WAYS[:3]]
        kills += [(matrix.killed_qemu, point, death) for point in among for death in deaths]
        for kill, point, how in chance.sample(kills, count):
            tried += await kill(*point, how)
    print(f"kill matrix: {tried} of {len(kills)} points, {operation}")
    return tried, len(kills)


async def kill_some_recoveries(operations, count, directory, qemu):
    """Kill the recoveries of one operation at some commands."""
    _, chance = rounds(1)
    operation, way = chance.choice(operations), chance.choice(["undo", "carry-on"])
    async with Matrix(operation, directory, qemu) as matrix:
        first = chance.choice(matrix.representative())
        trace = await matrix.recovery_trace(first, way)
        for _ in range(count):
            number = chance.randint(1, len(trace))
            await matrix.killed_recovery(first, number, chance.choice(MOMENTS), way)
    print(f"kill matrix: {count} of {2 * len(trace)} points, recovery ({way}) of {operation}")


def changing(matrix):
    """Return the points that change anything: what is asked before the lock only soak kills."""
    return [point for point in matrix.points() if point[0] >= matrix.first_change]
