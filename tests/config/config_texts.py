"""Texts of files that several tests load."""

from helpers import RECORD_KINDS

MODEL = """\
model:
  vision_encoder: {name: efficientnet_lite0, freeze: true}
  connector: linear
  language_model: {name: hf, path: /llm}
  template: qa
"""
"""Five lines that make a valid model."""

PROMPTS = """\
<Img><ImageHere></Img> Describe this image in detail.
a line that is no prompt
<Img><ImageHere></Img> Take a look at this image and describe what you notice.
"""

ALL_KEYS = """\
model:
  arch: mini_gpt4
  model_type: pretrain_vicuna
  image_size: 224
  drop_path_rate: 0
  use_grad_checkpoint: False
  vit_precision: fp16
  freeze_vit: True
  freeze_qformer: True
  has_qformer: True
  num_query_token: 32
  q_former_model: https://host/blip2_pretrained_flant5xxl.pth
  vit_model: eva_clip_g
  llama_model: /path/to/vicuna
  prompt_path: prompts.txt
  prompt_template: '###Human: {} ###Assistant: '
  max_txt_len: 160
  end_sym: "###"
  low_resource: False
  device_8bit: 0
  ckpt: /path/to/ckpt.pth
  prompt: ""
  lora_r: 64
  lora_alpha: 16
  chat_template: True
  use_grad_checkpoint_llm: True
  max_context_len: 3800
preprocess:
  vis_processor:
    train: {name: blip2_image_train, image_size: 224}
    eval: {name: blip2_image_eval, image_size: 224}
  text_processor:
    train: {name: blip_caption}
    eval: {name: blip_caption}
datasets:
  laion:
    batch_size: 64
    vis_processor:
      train: {name: blip2_image_train, image_size: 224, mean: [1, 2, 3], std: [4, 5, 6], min_scale: 0.5, max_scale: 1}
    text_processor:
      train: {name: blip_caption, prompt: "a ", max_words: 50}
    sample_ratio: 115
    type: defaults
    data_type: images
    build_info:
      storage: "/data/laion/{00000..10488}.tar"
  coco_caption:
    batch_size: 6
    build_info:
      annotations:
        train: {url: "https://host/a.json", md5: abc, storage: /data/a.json}
        val: {storage: /data/b.json}
      images: {storage: /data/images}
  gqa:
    build_info:
      image_path: /data/gqa
      ann_path: /data/gqa.json
evaluation_datasets:
  refcoco+:
    eval_file_path: /eval/refcoco
    img_path: /eval/images
    max_new_tokens: 20
    batch_size: 10
  vsr: {max_new_tokens: 30, batch_size: 8}
run:
  task: image_text_pretrain
  runner: runner_iter
  lr_sched: linear_warmup_cosine_lr
  init_lr: 1e-4
  min_lr: 8e-5
  warmup_lr: 1e-6
  warmup_steps: 5000
  lr_decay_rate: null
  weight_decay: 0.05
  beta2: 0.999
  max_iters: 20001
  iters_per_inner_epoch: 5000
  accum_grad_iters: 1
  amp: True
  num_workers: 4
  seed: 42
  output_dir: output/stage1
  resume_ckpt_path: null
  train_splits: [train]
  log_freq: 50
  save_freq: 5
  val_freq: 1
  save_last: True
  train_dataset_ratios: {gqa: 3}
  use_dist_eval_sampler: True
  lr_layer_decay: 1
  device: cuda
  world_size: 1
  dist_url: "env://"
  distributed: True
  wandb_log: True
  job_name: minigpt4_pretrain
  max_len: 30
  min_len: 1
  num_beams: 5
  num_ans_candidates: 128
  inference_method: rank
  prompt: "Question: {}"
"""
"""Every key of section 4 of the MiniGPT-4 spec, on a line of its own where it has one."""

STAGE1 = """\
model:
  arch: minigpt4
  model_type: pretrain_vicuna0


datasets:
  laion:
    batch_size: 64
    vis_processor:
      train:
        name: "blip2_image_train"
        image_size: 224
    text_processor:
      train:
        name: "blip_caption"
    sample_ratio: 115
  cc_sbu:
    batch_size: 64
    vis_processor:
        train:
          name: "blip2_image_train"
          image_size: 224
    text_processor:
        train:
          name: "blip_caption"
    sample_ratio: 14


run:
  task: image_text_pretrain
  # optimizer
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 1e-4
  min_lr: 8e-5
  warmup_lr: 1e-6

  weight_decay: 0.05
  max_epoch: 4
  num_workers: 4
  warmup_steps: 5000
  iters_per_epoch: 5000

  seed: 42
  output_dir: "output/minigpt4_stage1_pretrain"

  amp: True
  resume_ckpt_path: null

  evaluate: False
  train_splits: ["train"]

  device: "cuda"
  world_size: 1
  dist_url: "env://"
  distributed: True

  wandb_log: True
  job_name: minigpt4_pretrain
"""

STAGE2_V1 = """\
model:
  arch: mini_gpt4
  model_type: pretrain_vicuna
  freeze_vit: True
  freeze_qformer: True
  max_txt_len: 160
  end_sym: "###"
  prompt_path: "prompts.txt"
  prompt_template: '###Human: {} ###Assistant: '
  llama_model: "/my/vicuna"
  ckpt: '/my/stage1/checkpoint.pth'
datasets:
  cc_sbu_align:
    vis_processor:
      train:
        name: "blip2_image_train"
        image_size: 224
    text_processor:
      train:
        name: "blip_caption"
    build_info:
      storage: /my/cc_sbu_align
run:
  task: image_text_pretrain
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 3e-5
  min_lr: 1e-5
  warmup_lr: 1e-6
  weight_decay: 0.05
  max_epoch: 5
  iters_per_epoch: 200
  batch_size_train: 12
  batch_size_eval: 12
  num_workers: 4
  warmup_steps: 200
  seed: 42
  output_dir: "output/minigpt4_stage2_finetune"
  amp: True
  resume_ckpt_path: null
  evaluate: False
  train_splits: ["train"]
  device: "cuda"
  world_size: 1
  dist_url: "env://"
  distributed: True
"""

STAGE2 = """\
model:
  arch: minigpt4
  model_type: pretrain_vicuna0

  max_txt_len: 160
  end_sym: "###"
  prompt_path: "prompts/alignment.txt"
  prompt_template: '###Human: {} ###Assistant: '
  ckpt: '/absolute/path/to/stage1/checkpoint/'


datasets:
  cc_sbu_align:
    batch_size: 12
    vis_processor:
      train:
        name: "blip2_image_train"
        image_size: 224
    text_processor:
      train:
        name: "blip_caption"

run:
  task: image_text_pretrain
  # optimizer
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 3e-5
  min_lr: 1e-5
  warmup_lr: 1e-6

  weight_decay: 0.05
  max_epoch: 5
  num_workers: 4
  warmup_steps: 200
  iters_per_epoch: 200

  seed: 42
  output_dir: "output/minigpt4_stage2_finetune"

  amp: True
  resume_ckpt_path: null

  evaluate: False
  train_splits: ["train"]

  device: "cuda"
  world_size: 1
  dist_url: "env://"
  distributed: True

  wandb_log: True
  job_name: minigpt4_finetune
"""

STAGE1_V1 = STAGE1.replace("arch: minigpt4", "arch: mini_gpt4").replace("pretrain_vicuna0", "pretrain_vicuna")
STAGE1_V1 = STAGE1_V1.replace("    batch_size: 64\n", "").replace(
    "  seed: 42\n", "  batch_size_train: 64\n  seed: 42\n"
)
STAGE1_V1 = STAGE1_V1.replace("  wandb_log: True\n  job_name: minigpt4_pretrain\n", "")

STAGE1_LLAMA2 = STAGE1.replace("pretrain_vicuna0", "pretrain_llama2")
STAGE2_LLAMA2 = STAGE2.replace("pretrain_vicuna0", "pretrain_llama2").replace('"###"', '"</s>"')
STAGE2_LLAMA2 = STAGE2_LLAMA2.replace("###Human: {} ###Assistant: ", "[INST] {} [/INST] ")

V2_DATASET = """\
  NAME:
    batch_size: 2
    vis_processor:
      train:
        name: "blip2_image_train"
        image_size: 448
    text_processor:
      train:
        name: "blip_caption"
    sample_ratio: 10
"""
V2_FINETUNE = (
    """\
model:
  arch: minigpt_v2
  model_type: pretrain
  max_txt_len: 1024
  image_size: 448
  end_sym: "</s>"
  llama_model: "/path/to/llama_checkpoint"
  ckpt: "/path/to/pretrained_checkpoint"
  use_grad_checkpoint: True
  chat_template: True
  lora_r: 64
  lora_alpha: 16

datasets:
"""
    + "".join(V2_DATASET.replace("NAME", name) for names in RECORD_KINDS.values() for name in names)
    + """
run:
  task: image_text_pretrain
  # optimizer
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 1e-5
  min_lr: 1e-6
  warmup_lr: 1e-6

  weight_decay: 0.05
  max_epoch: 50
  num_workers: 6
  warmup_steps: 1000
  iters_per_epoch: 1000

  seed: 42
  output_dir: "/path/to/save_checkpoint"

  amp: True
  resume_ckpt_path: null

  evaluate: False
  train_splits: ["train"]

  device: "cuda"
  world_size: 1
  dist_url: "env://"
  distributed: True

  wandb_log: True
  job_name: minigptv2_finetune
"""
)

EVAL = """\
model:
  arch: minigpt4
  model_type: pretrain_vicuna0
  max_txt_len: 160
  end_sym: "###"
  low_resource: True
  prompt_template: '###Human: {} ###Assistant: '
  ckpt: 'please set this value to the path of pretrained checkpoint'

datasets:
  cc_sbu_align:
    vis_processor:
      train:
        name: "blip2_image_eval"
        image_size: 224
    text_processor:
      train:
        name: "blip_caption"

run:
  task: image_text_pretrain
"""
EVAL_LLAMA2 = EVAL.replace("pretrain_vicuna0", "pretrain_llama2").replace('"###"', '"</s>"')
EVAL_LLAMA2 = EVAL_LLAMA2.replace("###Human: {} ###Assistant: ", "[INST] {} [/INST] ")
EVAL_V1 = EVAL.replace("arch: minigpt4", "arch: mini_gpt4").replace("pretrain_vicuna0", "pretrain_vicuna")
EVAL_V1 = EVAL_V1.replace("  ckpt:", '  prompt_path: "prompts/alignment.txt"\n  ckpt:')
EVAL_V2 = """\
model:
  arch: minigpt_v2
  model_type: pretrain
  max_txt_len: 500
  end_sym: "</s>"
  low_resource: True
  prompt_template: '[INST] {} [/INST]'
  ckpt: "please set this value to the path of pretrained checkpoint"
  lora_r: 64
  lora_alpha: 16
""" + EVAL[EVAL.index("\ndatasets:") :].replace("224", "448")

BENCHMARKS = {name: "vqa" for name in ("gqa", "okvqa", "vizwiz", "iconvqa", "vsr", "hm")}
BENCHMARKS |= {name: "phrase" for name in ("refcoco", "refcocog", "refcoco+")}
BENCHMARK_EVALUATION = EVAL_V2.replace('  ckpt: "please', '  llama_model: ""\n  ckpt: "please')
BENCHMARK_EVALUATION = (
    BENCHMARK_EVALUATION[: BENCHMARK_EVALUATION.index("run:")]
    + "evaluation_datasets:\n"
    + "".join(
        f"  {name}:\n    eval_file_path: /path/to/eval/annotation/path\n    img_path: /path/to/eval/image/path\n"
        f"    max_new_tokens: 20\n    batch_size: 10\n"
        for name in BENCHMARKS
    )
    + "\nrun:\n  task: image_text_pretrain\n  name: minigptv2_evaluation\n  save_path: /path/to/save/folder_path\n"
)
