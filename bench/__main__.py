"""One run in a process of its own: options as JSON on stdin, results as a line of JSON on stdout."""

import json
import sys

from . import suite


def main() -> None:
    told = json.load(sys.stdin)
    options = suite.Options(**{**told, "suites": tuple(told["suites"]), "only": tuple(told["only"])})
    results = suite.run(options)
    if results.error is not None:
        raise results.error
    print(json.dumps(results.json()))


if __name__ == "__main__":
    main()
