"""Train an XLNet with differentiable memory on a SQuAD-format file, in stages that grow, and look into its memory.

    python examples/train_with_differentiable_memory.py train.json --eval dev.json --output out/differentiable

From a random start with tiny sizes (minutes on a CPU: a check of the pipeline, not of quality); with --model FOLDER
from a pretrained XLNet.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from memkern.analysis import VISUALIZATION_AVAILABLE, HopTracker, MemoryVisualizer
from memkern.data import TimeStepMajorDataLoader, squad_features
from memkern.training import TrainingConfig, XLNetRecurrentTrainer


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="a SQuAD-format JSON file")
    parser.add_argument("--eval", help="another; the training file by default")
    parser.add_argument("--model", help="folder of a pretrained XLNet; a tiny random one by default")
    parser.add_argument("--output", type=Path, default=Path("out/differentiable"))
    parser.add_argument("--epochs", type=int, default=2, help="of each stage")
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--samples", type=int, help="train on so many questions only")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    tiny = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "initializer_range": 0.05}
    config = TrainingConfig(
        model_name=options.model or "random start",
        base_config=None if options.model else tiny,
        train_file=options.train,
        eval_file=options.eval or options.train,
        max_train_samples=options.samples,
        max_eval_samples=options.samples,
        max_seq_length=options.max_length,
        doc_stride=options.max_length // 4,
        max_n_segs=4,
        use_differentiable_memory=True,
        memory_num_tokens=0,
        memory_sharpness=1.5,
        enable_usage_tracking=True,
        enable_temporal_links=True,
        progressive_stages=[
            {"segments": 1, "num_memory_heads": 1, "memory_slots": 16, "num_epochs": options.epochs},
            {"segments": 2, "num_memory_heads": 2, "memory_slots": 16, "num_epochs": options.epochs},
            {"segments": 4, "num_memory_heads": 4, "memory_slots": 32, "num_epochs": options.epochs},
        ],
        learning_rate=3e-5 if options.model else 1e-3,
        memory_learning_rate=1e-4 if options.model else None,
        warmup_freeze_base_epochs=1 if options.model else 0,
        warmup_disable_global_softmax_epochs=0,
        gradient_accumulation_steps=1,
        logging_steps=20,
        output_dir=str(options.output),
    )
    trainer = XLNetRecurrentTrainer(config)
    trainer.train(resume_from_checkpoint=options.resume or None)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']:5d}  stage {entry['stage']}  loss {entry['loss']:.3f}")
    scores = trainer.evaluate()
    print({name: round(value, 2) for name, value in scores.items()})

    # One document through the memory: which slots are read and written, segment after segment.
    features = squad_features(
        trainer.examples("eval")[:1],
        trainer.tokenizer,
        max_length=config.max_seq_length,
        doc_stride=config.doc_stride,
        on_bad_answer="skip",
    )
    (document,) = TimeStepMajorDataLoader(features, batch_size=1)
    model, tracker, state, seen = trainer.model.eval(), HopTracker(), None, []
    with torch.no_grad():
        for number, step in enumerate(document):
            inputs = {name: step[name] for name in ("input_ids", "attention_mask", "token_type_ids", "cls_index")}
            result = model(**inputs, memory_state=state)
            state = result.new_memory_state
            seen.append(result.memory_info)
            tracker.record_hop(result.memory_info, f"segment {number}")
    print(f"{len(seen)} segments, usage of the slots {[round(float(u), 2) for u in seen[-1]['usage'][0][:8]]} ...")
    tracker.export_analysis(options.output / "hops.json")
    if VISUALIZATION_AVAILABLE:
        draw = MemoryVisualizer(options.output / "plots")
        history = {name: [info[name][0] for info in seen] for name in ("read_weights", "write_weights", "usage")}
        draw.create_summary_report(history, "memory")
        tracker.visualize_attention_flow(options.output / "plots/flow.png")
    return scores


if __name__ == "__main__":
    main()
