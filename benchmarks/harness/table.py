"""The tables that a run of checked cases prints."""

from .measure import COPY_BANDWIDTH, MICROSECONDS, OURS
from .report import amount
from .timing import other


def verdict(target):
    """One bound and whether it was reached."""
    bound = f"≥ {target['at_least']:g}" if target["at_most"] is None else f"≤ {target['at_most']:g}"
    return f"{bound} {({True: 'reached', False: 'MISSED', None: 'not measured'})[target['reached']]}"


def table(name, result):
    """The lines of one case."""
    shapes = ", ".join(f"{tensor} {tuple(shape)}" for tensor, shape in result["shapes"].items())
    lines = [f"{name}   {shapes}   error {result['check']['error']:.1e} (allowed {result['check']['allowed']:.0e})"]
    verdicts = {target["of"]: verdict(target) for target in result["targets"]}
    if result["kind"] == "memory":
        for contender, row in result["contenders"].items():
            lines.append(f"  {contender:<20}{amount(row['extra_bytes']):>12} beyond the inputs")
        for size, value in result["ratios"].items():
            of_size = f"{amount(result['bytes'][size])} of {size}"
            lines.append(f"  {OURS} / {of_size:<24}{value:>10.3g}   {verdicts.get(size, '')}".rstrip())
        return lines
    rest = other(result["judged"])
    unit, scale, digits = ("ms", 1, 3) if result["clock"] == "host" else ("µs", 1e3, 2)
    heads = (f"median {unit}", "min", "IQR", f"{rest} {unit}", "ratio", f"{rest} ratio", "GB/s")
    heads += ("of copy",) * ("share_of_copy" in result["contenders"][OURS])
    lines.append(" " * 22 + "".join(f"{head:>11}" for head in heads))
    verdicts[OURS] = ", ".join(f"{of} {verdicts[of]}" for of in (COPY_BANDWIDTH, MICROSECONDS) if of in verdicts)
    for contender, row in result["contenders"].items():
        times = (row[f"{kind}_ms"] for kind in ("median", "min", "iqr", f"{rest}_median"))
        ratios = (result[kind].get(contender, 1) for kind in ("ratios", f"{rest}_ratios"))
        speed = "" if row["bytes_per_second"] is None else f"{row['bytes_per_second'] / 1e9:.1f}"
        share = f"{row['share_of_copy']:.1%}" if "share_of_copy" in row else ""
        cells = (*(f"{scale * time:.{digits}f}" for time in times), *(f"{ratio:.3g}" for ratio in ratios), speed, share)
        figures = "".join(f"{cell:>11}" for cell in cells)
        lines.append(f"  {contender:<20}{figures}   {verdicts.get(contender, '')}".rstrip())
    lines += [f"  {contender:<20} did not run: {why}" for contender, why in result["failed"].items()]
    return lines


def predicted_us(case, speed):
    """Microseconds that the bytes of a case take at `speed` GB/s; None for a case that memory does not bound."""
    return None if not speed or case.bytes_moved is None else case.bytes_moved / speed / 1e3


def predictions(cases, speed):
    """The lines of a table of all cases that memory bounds."""
    rows = [(case.name, case.bytes_moved, predicted_us(case, speed)) for case in cases if case.bytes_moved]
    lines = [f"{'at ' + format(speed, 'g') + ' GB/s':<64}{'bytes':>15}{'µs':>10}"]
    return lines + [f"{name:<64}{size:>15,}{microseconds:>10.1f}" for name, size, microseconds in rows]


def target_lines(results):
    """How many targets were reached, and which were not."""
    targets = [(result["name"], target) for result in results for target in result["targets"]]
    missed = [f"not reached: {name} / {target['of']}" for name, target in targets if not target["reached"]]
    return [f"{len(targets) - len(missed)} of {len(targets)} targets reached", *missed]
