"""Splits a total batch into equal micro batches, or names the sizes that would split it."""


def micro_steps(total: int, micro: int, num_processes: int) -> int:
    """Micro-steps per optimizer step: total batch / (micro batch × processes), all in pairs.

    Raises:
        ValueError: when that is not a whole number; the message names the sizes that would work.
    """
    pairs_at_once = micro * num_processes
    if total % pairs_at_once == 0:
        return total // pairs_at_once
    below = total // pairs_at_once * pairs_at_once
    totals = [size for size in (below, below + pairs_at_once) if size > 0]
    choices = [f"train.total_batch_pairs {' or '.join(map(str, totals))}"]
    per_process, uneven = divmod(total, num_processes)
    if not uneven:
        micros = [size for size in range(1, per_process + 1) if per_process % size == 0]
        nearest = sorted(sorted(micros, key=lambda size: abs(size - micro))[:3])
        choices.append(f"train.micro_batch_pairs {' or '.join(map(str, nearest))}")
    pieces = f"micro batches of {micro}"
    if num_processes > 1:
        pieces = f"{num_processes} processes with {pieces}"
    raise ValueError(f"a total batch of {total} pairs cannot be split into {pieces}; choose {', or '.join(choices)}")
