"""Hugging Face's Trainer: compile the model in place before the Trainer gets it."""

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

import fastseg

config = SegformerConfig(num_labels=5, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=32)
model = SegformerForSemanticSegmentation(config)
model.compile(backend="fastseg")  # torch_compile_backend of TrainingArguments takes torch's own backends alone

images, masks = torch.rand(4, 3, 64, 64), torch.randint(5, (4, 64, 64))
dataset = [{"pixel_values": image, "labels": mask} for image, mask in zip(images, masks, strict=True)]
arguments = TrainingArguments("runs/segformer", max_steps=1, save_strategy="no", report_to="none")
loss = Trainer(model, arguments, train_dataset=dataset).train().training_loss
report = fastseg.report(model)
print(report)  # the loss in the model's own forward is upsample_cross_entropy
