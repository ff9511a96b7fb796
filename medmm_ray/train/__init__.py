"""Training: one loop (`loop` with DeepSpeed, `launch` under Ray Train) and the four stages that it runs.

`policy`: worked solutions -> a causal language model. `image_text`: captions -> an image tower. `text_prm`: labelled
solutions -> the text tower of a reward model. `two_tower`: its cached states and images -> the whole reward model.
Each stage's ``train_<stage>(config, …, folder, name)`` is called in the driver, leaves a model in `folder` with
``history.json`` beside it, and gives figures.
"""
