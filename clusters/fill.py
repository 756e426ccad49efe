"""Write the ids of the stack of aws-setup.yaml into aws.yaml and aws-spot.yaml.

    python clusters/fill.py STACK [--region REGION]

Needs boto3 and credentials that may describe the stack. Run again, for another stack or after an update of it, it
replaces the ids it wrote before.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import yaml

FILES = ("aws.yaml", "aws-spot.yaml")
MARK = "FILL_"


def fill(text: str, ids: dict[str, str]) -> str:
    """A cluster file with ``ids`` in place of its placeholders, or of the ids that ``metadata`` says are there.

    Raises:
        ValueError: the stack lacks an output that the file needs.
    """
    there = yaml.safe_load(text)["metadata"]
    if not isinstance(there, dict):
        there = {name: MARK + name for name in re.findall(MARK + r"([A-Za-z]+)", text)}
    missing = sorted(set(there) - set(ids))
    if missing:
        raise ValueError(f"the stack has no output {', '.join(missing)}")
    for name, value in there.items():
        text = text.replace(value, ids[name])
    return re.sub(r"^metadata:.*$", "metadata: " + json.dumps(ids), text, flags=re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the ids of a stack into aws.yaml and aws-spot.yaml.")
    parser.add_argument("stack", help="name of the CloudFormation stack of aws-setup.yaml")
    parser.add_argument("--region", help="default: that of the AWS configuration")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the cluster files are")
    arguments = parser.parse_args()

    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        stacks = boto3.client("cloudformation", region_name=arguments.region).describe_stacks(StackName=arguments.stack)
        ids = {output["OutputKey"]: output["OutputValue"] for output in stacks["Stacks"][0].get("Outputs", [])}
        filled = {name: fill((arguments.folder / name).read_text(), ids) for name in FILES}
    except (BotoCoreError, ClientError, ValueError) as error:
        print(f"error: {arguments.stack}: {error}", file=sys.stderr)
        return 2
    for name, text in filled.items():
        (arguments.folder / name).write_text(text)
        print(f"filled     {arguments.folder / name}")
    for name, value in ids.items():
        print(f"{name:<16} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
