#!/usr/bin/env bash
# Remake the tables and pictures of README.md and assets/results.md from nothing: hours on a CPU.
#
#     bash tests/make_results.sh                # everything
#     bash tests/make_results.sh masks main     # some parts: masks main long gists profile exercises
#     SMOLLM2=DIR ALPACA=DIR bash tests/make_results.sh smollm2       # needs weights and data
#     PAPER=DIR bash tests/make_results.sh paper                      # the paper's released outputs
#
# It can be stopped at any time: what is finished is skipped, a run that was cut short goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/results}
SEEDS=${SEEDS:-0 1 2}

run() {  # NAME FLAGS...: train and evaluate, unless that is done
    run_program train.py "$@"
}

run_program() {  # PROGRAM NAME FLAGS...: the same with another program than train.py
    local program=$1 out=$OUT/$2 resume=""
    shift 2
    if [ -f "$out/metrics.json" ]; then return; fi
    # This goes on with a run that was cut short, and evaluates one that has all its steps.
    if [ -f "$out/train_log.jsonl" ]; then resume=--resume; fi
    python $program "$@" --out_dir "$out" $resume
}

evaluate() {  # NAME FLAGS...: answer all splits, unless that is done
    local out=$OUT/$1
    shift
    if [ ! -f "$out/metrics.json" ]; then python eval.py run "$out" "$@"; fi
}

masks() {
    python -m tests.exercises.draw_masks --out assets/masks.png
}

main() {  # the README's table and what stands beside it
    for arch in llama t5; do
        for condition in gist pos_control neg_control; do
            for seed in $SEEDS; do
                run "$arch-$condition-1-seed$seed" --arch $arch --condition $condition --seed "$seed"
            done
        done
    done
    table
    python -m tests.exercises.draw_results families "$OUT"/*-gist-1-seed0 --metric exact_match --out assets/families.png
    python -m tests.exercises.attention "$OUT/llama-gist-1-seed0" \
        --instruction "Put lamp at the front and bread at the end." --out assets/attention.png
}

long() {  # is it time that is missing after six minutes?
    for seed in $SEEDS; do
        for condition in gist pos_control; do
            run "llama-$condition-1-7500-seed$seed" --condition $condition --seed "$seed" --max_steps 7500
        done
    done
    run t5-gist-1-7500-seed0 --arch t5 --max_steps 7500
    table
}

gists() {  # more gist tokens, and words instead of them
    if [ ! -d "$OUT/keywords-1" ]; then python -m tests.exercises.keywords --n 1 --out "$OUT/keywords-1"; fi
    for arch in llama t5; do
        for n in 2 5 10; do
            run "$arch-gist-$n-seed0" --arch $arch --n_gist $n
        done
        run "$arch-tfidf-1-seed0" --arch $arch --condition pos_control --n_gist 0 --data "$OUT/keywords-1"
    done
    table
    python -m tests.exercises.draw_results n_gist "$OUT"/*-gist-*-seed0 "$OUT"/*_control-1-seed0 \
        --metric exact_match --out assets/n_gist.png
}

table() {
    python tests/make_table.py "$OUT"/*-seed*
}

profile() {
    python profile.py paper
}

run_smollm2() {  # PROGRAM NAME FLAGS...: train for one pass, then answer with at most 256 tokens
    local program=$1 name=$2
    shift 2
    run_program "$program" "$name" --init_from "$SMOLLM2" --data "$ALPACA" --batch_size 8 --lr 2e-4 \
        --dtype bfloat16 --epochs 1 --eval_every 1000000 --no_eval "$@"
}

evaluate_smollm2() {
    for name in "$@"; do evaluate "$name" --dtype bfloat16 --max_new_tokens 256; done
}

smollm2() {  # --eval_every: the loss of validation is in the log, after the last step
    for condition in pos_control gist neg_control; do
        run_smollm2 train.py "smollm2-$condition" --condition $condition --see_start
    done
    for seed in 1 2; do run_smollm2 train.py smollm2-gist-seed$seed --see_start --seed $seed; done
    run_smollm2 train.py smollm2-two_passes --see_start --epochs 2
    run_smollm2 train.py smollm2-gist2 --see_start --n_gist 2
    run_smollm2 train.py smollm2-hidden  # the paper's mask: <s> is part of the prompt
    run_smollm2 "-m tests.exercises.gist_starts --start first" smollm2-first --see_start
    run_smollm2 "-m tests.exercises.gist_starts --start prompt" smollm2-prompt --see_start
    run_smollm2 "-m tests.exercises.distillation --teacher $OUT/smollm2-pos_control" \
        smollm2-distilled --see_start
    run_smollm2 "-m tests.exercises.gist_lora --n_test 1" smollm2-lora --see_start \
        --init_from "$OUT/smollm2-pos_control" --lr 8e-4
    evaluate_smollm2 smollm2-{pos_control,gist,gist-seed1,gist-seed2,neg_control}
    evaluate_smollm2 smollm2-{two_passes,gist2,hidden,distilled}
    local runs=("$OUT"/smollm2-{gist,neg_control,pos_control})
    python -m tests.exercises.learning_curve "${runs[@]}" --metric loss --window 80 \
        --out assets/smollm2.png
    for split in unseen human; do
        python -m tests.exercises.learning_curve "${runs[@]}" --split $split --out "$OUT/curve.png"
        python -m tests.exercises.loss_share "${runs[@]}" --split $split
    done
    python -m tests.exercises.more_prompts "$OUT"/smollm2-{gist,pos_control,neg_control} \
        --out assets/more_prompts.png
    python -m tests.exercises.attention_sink "$SMOLLM2" --data "$ALPACA" --out assets/attention_sink.png
    python profile.py run "$SMOLLM2" --prompt_tokens 32 64 128 256 512 --out assets/profile.png
}

paper() {
    python eval.py score "$PAPER"/*.csv
    python eval.py winrate "$PAPER"/*.json
}

pretrain() {  # NAME FLAGS...: gist pretraining, unless that is done
    if [ ! -f "$OUT/$1/model.safetensors" ]; then
        python -m tests.exercises.gist_pretraining --max_steps 1000 --out_dir "$OUT/$1" "${@:2}"
    fi
}

run_pretrained() {  # NAME STEPS SEED: gist training from pretrained weights
    run "$1-$2-$3" --init_from "$OUT/$1" --optimizer muon --lr 3e-3 --max_steps "$2" --seed "$3"
}

exercises() {
    local model=$OUT/llama-gist-1-seed0
    run llama-gist-1-seed0
    for condition in pos_control neg_control; do
        run "llama-$condition-1-seed0" --condition $condition
    done
    python -m tests.exercises.live_table
    python -m tests.exercises.count_flops --p 26 --q 10
    python -m tests.exercises.sixteen_users "$model"
    python -m tests.exercises.mean_of_two_gists "$model"
    python -m tests.exercises.cartridge "$model"
    python -m tests.exercises.what_else_to_keep "$model" "$OUT/llama-pos_control-1-seed0"
    python -m tests.exercises.gist_embedding_only "$OUT/llama-pos_control-1-seed0"
    python -m tests.exercises.where_one_token_fails "$OUT/llama-pos_control-1-seed0" \
        --out "$OUT/facts.png"
    if [ ! -f "$OUT/lora/model.safetensors" ]; then
        python -m tests.exercises.gist_lora --init_from "$OUT/llama-pos_control-1-seed0" --lr 3e-3 \
            --out_dir "$OUT/lora"
    fi
    for seed in $SEEDS; do
        run "llama-pos_control-1-seed$seed" --condition pos_control --seed "$seed"
        run_program "-m tests.exercises.distillation" "distilled-$seed" \
            --teacher "$OUT/llama-pos_control-1-seed$seed" --seed "$seed"
        evaluate "distilled-$seed"
    done
    python -m tests.exercises.learning_curve --out "$OUT/curve.png" \
        "$OUT"/llama-{gist,pos_control,neg_control}-1-seed0
    python -m tests.exercises.several_gists
    python -m tests.exercises.accumulating_gists
    python -m tests.exercises.long_prompts --out assets/shots.png
    pretrain pretrained
    for steps in 500 1000; do
        run_pretrained pretrained $steps 0
        run "unpretrained-$steps" --max_steps $steps
    done
    for seed in $SEEDS; do run_pretrained pretrained 3000 "$seed"; done
    # Other pretrained weights, fewer steps of pretraining, and the mask of pos_control.
    pretrain pretrained-other --seed 1
    for seed in 0 2; do run_pretrained pretrained-other 3000 "$seed"; done
    pretrain pretrained-short --max_steps 400
    for seed in 1 2; do run_pretrained pretrained-short 3000 "$seed"; done
    for seed in 0 2; do run_pretrained pretrained-short 1850 "$seed"; done
    pretrain pretrained-control --condition pos_control
    run_pretrained pretrained-control 3000 2
    pretrain pretrained-t5 --arch t5
    run_pretrained pretrained-t5 3000 0
}

if [ $# = 0 ]; then set -- masks main long gists profile exercises; fi
for part in "$@"; do "$part"; done
