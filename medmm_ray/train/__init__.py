"""Training: one loop (`loop`, with DeepSpeed; `launch` runs it under Ray Train) and the four stages that it trains.

`policy`: worked solutions -> a causal language model. `image_text`: captions -> an image tower. `text_prm`: labelled
solutions -> the text tower of a reward model. `two_tower`: its stored states, and images -> the whole reward
model. ``<stage>_data`` makes a stage's examples of tables, `labelled_rows` of tables that
fit no memory; `stage` says what a stage brings to the loop.
Each stage's ``train_<stage>(config, …, folder, name)`` is called in the driver, leaves a model in `folder` with
``history.json`` beside it, and gives figures.
"""
