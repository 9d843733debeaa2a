"""Faults that are put into the scripts, to see whether a check of the Recipe bites: matrix.py does it.

A fault is an edit of a script, as somebody would make it by mistake, and names the check that must turn red.
Those that are not ours are named in the article, or were found in code that people use.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    what: str
    source: str  # where it was seen
    model: str
    check: str  # name of the check that must turn red
    file: str
    edits: tuple  # (what the text was, what it is), ...
    data: str = "strokes"  # the digits on which the model is checked


ARTICLE, TWEET, OURS = "the article", "Karpathy's list of common mistakes, 2018", "ours"
FOUND, MNIST = "lecun1989-repro, 2022", "mnist"
# fmt: off
FAULTS = {
    "loss of the last example": Fault(
        "A split's loss is that of the last training example", FOUND, "modern", "consistent", "modern",
        (('                    loss, misses = evaluate(outputs, answers, config["loss"])',
          '                    _, misses = evaluate(outputs, answers, config["loss"])\n'
          '                    last = replicas.compute_outputs(images[-1:])[0]\n'
          '                    loss, _ = evaluate(last, labels[-1:], config["loss"])'),)),
    "truncated misses": Fault(
        "Misses are int(error * n), rounded down", FOUND, "modern", "as_reported", "modern",
        (("misses = int((outputs.argmax(axis=1) != labels).sum())",
          "misses = int(float(np.float32((outputs.argmax(axis=1) != labels).mean())) * len(labels))"),)),
    "labels apart": Fault(
        "Images are shuffled for each pass, their labels are not", ARTICLE, "modern", "it_learns", "modern",
        (("replicas.train_pass(images[part], ",
          "replicas.train_pass(np.random.default_rng(number).permutation(images[part]), "),)),
    "one shift for all": Fault(
        "A thousand digits are moved in the same way", OURS, "modern", "before_the_network", "modern",
        (("    y, x = (places - down[",
          "    down, right = (own[..., :1].expand_as(own) for own in (down, right))\n"
          "    y, x = (places - down["),)),
    "clipped loss": Fault(
        "The loss is clipped, and not its gradient", ARTICLE, "modern", "training_again", "modern",
        (("F.cross_entropy)(outputs, targets)", "F.cross_entropy)(outputs, targets).clamp(max=2)"),)),
    "test digits in [0, 1]": Fault(
        "Test digits are scaled to [0, 1], not [-1, 1]", ARTICLE, "lecun1989", "values", "repro",
        (("add_border(digits.test_images[:n])", "add_border(digits.test_images[:n] / 2 + 0.5)"),)),
    "view for transpose": Fault(
        "A view in the place of a transposition mixes the batch", ARTICLE, "mnist1d-cnn", "rows", "mnist1d",
        (("return h.flatten(1, 2)  # 40", "return h.movedim(3, 1).reshape(len(h), -1, h.shape[3])  # 40"),)),
    "batch statistics": Fault(
        "Units are normalised by the batch, at evaluation, too", TWEET, "modern", "rows", "modern",
        (("    x = activate(torch.addmm(H3b", "    x = F.batch_norm(x, None, None, training=True)\n"
          "    x = activate(torch.addmm(H3b"),)),
    "label left in": Fault(
        "Test images keep the right label", OURS, "forward-forward", "train_like_test",
        "forward_forward", (("    return {split: (normalise(x), y) for",
          '    return {split: (write_label(normalise(x), y, 8.0 * (split == "test")), y) for'),)),
    "leaking layer": Fault(
        "A layer changes the one below it", OURS, "forward-forward", "layers_are_local", "forward_forward",
        (("        step_layer(layer, own, n, rate, config, network.engine, threads)\n",
          "        step_layer(layer, own, n, rate, config, network.engine, threads)\n"
          "        if number:\n"
          "            network.layers[number - 1].weights.add_(1e-3 * layer.velocity.sum(dim=1))\n"),)),
    "another run's schedule": Fault(
        "The rate is still falling when training ends", ARTICLE, "modern", "lr_decay", "modern",
        (('(config["passes"] - 1) if', '(config["passes"] + 19) if'),)),
    "order of a set": Fault(
        "Splits are drawn in the order of a Python set", FOUND, "lecun1989", "fresh_processes", "prepro",
        (('("test", "train") if draw == "test-first" else ("train", "test")', '{"train", "test"}'),), MNIST),
    "every other row": Fault(
        "MNIST is thinned out by [::2]: students remain", "a pilot of ours", "lecun1989", "writers", "prepro",
        (("generator.permutation(len(labels))[:", "np.arange(len(labels))[::2][:"),), MNIST),
    "stopped by the test set": Fault(
        "Training ends when test misses rise", "Recht et al. 2018", "modern", "decided_without_test",
        "modern",
        (("misses, len(answers)))\n", "misses, len(answers)))\n"
          '        counts = [r["misses"] for r in records[seeds[0]] if r["split"] == "test"]\n'
          "        if len(counts) > 1 and counts[-1] > counts[-2]:\n"
          "            break\n"),)),

    "inverted targets": Fault(
        "The right digit's target is -1", OURS, "lecun1989", "it_learns", "repro",
        (("return target * (2 * np", "return -target * (2 * np"),)),
    "uphill": Fault(
        "PyTorch goes up the gradient; C does not", OURS, "lecun1989", "engines_agree", "repro",
        (("parameter.sub_(gradient, alpha=lr)", "parameter.add_(gradient, alpha=lr)"),)),
    "seed not used": Fault(
        "All seeds begin with the same weights", OURS, "lecun1989", "fix_the_seed", "repro",
        (("generator = np.random.RandomState(seed)", "generator = np.random.RandomState(1337)"),)),
    "test in training": Fault(
        "The test digits are the first to train on", OURS, "lecun1989", "duplicates", "prepro",
        (("(STROKES_SEED, 2)", "(STROKES_SEED, 1)"),)),
    "nearly in training": Fault(
        "The test digits are training digits with noise", OURS, "lecun1989", "near_duplicates", "prepro",
        (("    test = strokes.draw_digits(test_size, (STROKES_SEED, 2))",
          "    images, labels = strokes.draw_digits(test_size, (STROKES_SEED, 1))\n"
          "    noise = np.random.default_rng(0).normal(0, 0.01, images.shape)\n"
          "    test = np.clip(images + noise, -1, 1).astype(np.float32), labels"),)),
    "training split twice": Fault(
        "What is called test is the training split", OURS, "modern", "consistent", "modern",
        (("(digits, answers) in splits.items():",
          '(digits, answers) in zip(splits, 2 * [splits["train"]]):'),)),
    "no last bias": Fault(
        "The last layer has no bias", OURS, "lecun1989", "outputs_again", "repro",
        (("    return activate(torch.addmm(outb, x, outw))", "    return activate(x @ outw)"),)),
    "wrong maps": Fault(
        "A third of H2 reads the maps of another", OURS, "modern", "receptive_fields", "modern",
        (("x[:, 0:4], x[:, 8:12])", "x[:, 0:4], x[:, 4:8])"),)),
    "gradient not zeroed": Fault(
        "Gradients add up from step to step", TWEET, "modern", "training_again", "modern",
        (("        optimizer.zero_grad()\n", ""),)),
    "dropout at evaluation": Fault(
        "Units are dropped at evaluation, too", TWEET, "modern", "outputs_again", "modern",
        (("x.flatten(1) * scale", "F.dropout(x.flatten(1) * scale, 0.25)"),)),
    "softmax twice": Fault(
        "The loss takes probabilities for logits", TWEET, "modern", "training_again", "modern",
        (("    outputs = forward(parameters, images, config, scale)\n",
          "    outputs = forward(parameters, images, config, scale).softmax(dim=1)\n"),)),
    "last batch dropped": Fault(
        "The last batch is never shown", OURS, "mnist1d-mlp", "learns_from_each", "mnist1d",
        (("first = step * size % len(labels)", "first = step * size % (len(labels) - size)"),)),
    "weights as printed": Fault(
        "Weights begin within 2.4 / fan-in", "the print of 1989", "lecun1989", "initial_loss", "repro",
        (('(fan_in if config["init"] == "fan-in" else fan_in**0.5)', "fan_in"),)),
    "bias of zero": Fault(
        "The last bias begins at 0", ARTICLE, "lecun1989", "last_bias", "repro",
        (('    "bias": "target",\n    "h2_scheme"', '    "bias": "zero",\n    "h2_scheme"'),)),
    "reading ahead": Fault(
        "The GRU's first direction reads from the end", OURS, "mnist1d-gru", "time_steps", "spatial_priors",
        (("torch.stack([x, x.flip(1)]", "torch.stack([x.flip(1), x]"),)),
    "detached layer": Fault(
        "No gradient passes the second layer", OURS, "mnist1d-mlp", "training_again", "mnist1d",
        (('linear(p, "hidden2", h).relu()', 'linear(p, "hidden2", h).relu().detach()'),)),
    "right negatives": Fault(
        "One negative in ten has the right label", OURS, "forward-forward", "negatives", "forward_forward",
        (("(labels + 1 + (9 * chance).long())", "(labels + (10 * chance).long())"),)),
    "mirrored digits": Fault(
        "Augmentation mirrors digits", OURS, "modern", "before_the_network", "modern",
        (("y % 16 + 2, x % 16 + 2]", "y % 16 + 2, 17 - x % 16]"),)),
    "another rate in C": Fault(
        "The C engine is given another learning rate", OURS, "modern", "engines_agree", "modern",
        (("(self.own, images, targets, lr, moments", "(self.own, images, targets, 1.02 * lr, moments"),)),
    "replicas share chance": Fault(
        "All replicas drop the units of the first", OURS, "modern", "replicas_agree", "modern",
        (("chance.sample_kept(self.seeds, ", "chance.sample_kept(0 * self.seeds + self.seeds[0], "),)),
    "scaled one by one": Fault(
        "Each test signal is scaled by its own deviation", OURS, "mnist1d-mlp", "outliers", "spatial_priors",
        (('= data["x_test"], data', '= data["x_test"] / data["x_test"].std(axis=1, keepdims=True), data'),)),
    "wrong labels": Fault(
        "Test digits with ink at their centre are labelled 8", OURS, "lecun1989", "labels_agree", "repro",
        (("digits.test_labels[:n]),",
          "np.where(digits.test_images[:n, 8, 8] > 0.7, 8, digits.test_labels[:n])),"),)),
    "a class is rare": Fault(
        "The training digits are the first of a sorted file", OURS, "lecun1989", "balance", "repro",
        (("(add_border(digits.train_images[:n]), digits.train_labels[:n])",
          "[a[np.argsort(digits.train_labels)[: len(a) * 9 // 10]] for a in"
          " (add_border(digits.train_images[:n]), digits.train_labels[:n])]"),)),
    "another resizing": Fault(
        "Digits are shrunk by another convention", OURS, "lecun1989", "genuine", "prepro",
        (("align_corners=False", "align_corners=True"),), MNIST),
    "mean of means": Fault(
        "Batches of 300 count alike, and the last has 100", OURS, "mnist1d-mlp", "whole_test_set", "mnist1d",
        (("at_a_time=500", "at_a_time=300"), ("cpu().double().sum(dim=1)", "cpu().double().mean(dim=1)"),
         ("(loss / len(labels)).tolist()", "(loss / -(-len(labels) // at_a_time)).tolist()"))),
    "a loss of sums": Fault(
        "The reported loss is a sum over digits", OURS, "modern", "as_reported", "modern",
        (("(len(labels)), labels]).mean())", "(len(labels)), labels]).sum())"),)),
    "wrapping around": Fault(
        "Digits that fill their frame wrap around", FOUND, "modern", "before_the_network", "modern",
        (('data == "usps":', 'data == "none":'),), "usps"),
}
# fmt: on
