"""Fine-tune what a run has trained: retrieval, grounding, questions, entailment, statements about one picture or two.

python experiments/finetune.py simla-tiny-kmeans128-001 task=vqa
python experiments/finetune.py photos task=entailment data.train='[train.parquet]' data.val='[val.parquet]'
"""

import sys

from simla_ray.orchestration.finetune import finetune_main

if __name__ == "__main__":
    sys.exit(finetune_main(sys.argv[1:]))
