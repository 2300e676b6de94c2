"""What is kept of a run, so that one that was interrupted goes on where it was."""

import json


def read(file, fresh):
    """What a file has of this run, or the beginning of one.

    Args:
        file: Path of the file, or `None`.
        fresh: What a run begins with. Its `"machine"` and `"sizes"` must be those of
            the file.

    Raises:
        SystemExit: The file is of another run, or none of `compare.py`.
    """
    if file is None or not file.exists():
        return fresh
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not (isinstance(found, dict) and found.keys() >= fresh.keys()):
        raise SystemExit(
            "`--json` must be a new file, or one that this script has begun. "
            f"Received: {file}"
        )
    for name in ("machine", "sizes"):
        if found[name] != fresh[name]:
            raise SystemExit(
                f"`--json` must be a new file, or one of a run with the same {name}, "
                f"{fresh[name]}. Received: {file}, with {found[name]}"
            )
    return found


def write(file, found):
    """Writes a file whole or not at all, if there is one to write."""
    if file:
        part = file.with_name(f"{file.name}.part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(file)


def check_versions(old, new):
    """Checks that sides go on with the libraries that they began with.

    Raises:
        SystemExit: A side has others than the file says.
    """
    for side, versions in new.items():
        if old.get(side, versions) != versions:
            raise SystemExit(
                f"`--json` must be a new file, for the libraries of {side} have "
                f"changed. Received: one of {old[side]}; they are {versions}"
            )


def is_finished(work, results, sides):
    """Whether all sides that can do a work, or a curve, have done it.

    Args:
        work: The `Work`, or the `Curve`.
        results: What is kept of works, or of curves, by their names.
        sides: Names of the sides that can run.
    """
    result = results.get(work.name)
    if result is None or result.get("job") != getattr(work, "job", None):
        return False
    wanted = set(getattr(work, "sides", ())) & set(sides)
    return wanted <= set(result.get("values", ()))


def put(result, results):
    """Puts a result in the place of the one that is kept, unless it has fewer sides.

    Returns:
        What is wrong.
    """
    old = results.get(result["name"], {})
    lost = old.get("values", {}).keys() - result.get("values", {}).keys()
    if lost and old["job"] == result["job"]:
        sides = ", ".join(sorted(lost))
        return [f"{result['name']}: what is kept stays, for it has {sides} besides"]
    results[result["name"]] = result
    return []
