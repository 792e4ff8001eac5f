"""Every option, once: its default, unit and meaning, and what values it may have."""

from yacs.config import CfgNode as Node

_ = Node()

_.SEED = 0  # of initialisation, data order, augmentation and device-side randomness
_.OUTPUT_DIR = ""  # the run's folder: checkpoints, log.txt, config.yaml, TensorBoard events
_.DEVICE = "auto"  # auto (a GPU where there is one) | cpu | cuda
_.PRINT_FREQ = 10  # steps between two lines of the log; metrics are fetched only then
_.RESUME = "auto"  # auto (from OUTPUT_DIR if it holds a checkpoint) | force (though options differ)

_.MODEL = Node()  # the backbone
_.MODEL.ARCH = "swin_tiny"  # a name in models/registry.py
_.MODEL.EMBED_DIM = 0  # width of the first stage; 0: the architecture's own
_.MODEL.DEPTHS = []  # blocks a stage; []: the architecture's own
_.MODEL.NUM_HEADS = []  # attention heads a stage; []: the architecture's own
_.MODEL.WINDOW_SIZE = 7  # Swin's window, patches a side
_.MODEL.PATCH_SIZE = 0  # pixels a side; 0: the architecture's own (Swin 4, ViT 16)
_.MODEL.IMG_SIZE = 224  # pixels that windows and position embeddings are laid out for
_.MODEL.DROP_PATH = 0.1  # the student's stochastic depth at its last block; the teacher has none
_.MODEL.NUM_CLASSES = 0  # always 0: backbones have no classifier (EsViT's commands set it)

_.HEAD = Node()  # both DINO heads, and the pooling; the projection of moco_v2 and lcr
_.HEAD.OUT_DIM = 65536  # K, prototypes (a projection has none)
_.HEAD.HIDDEN_DIM = 2048  # width of the MLP
_.HEAD.BOTTLENECK_DIM = 256  # d, width of the embeddings
_.HEAD.LAYERS = 3  # linears in the MLP
_.HEAD.USE_BN = False  # BatchNorm in the MLP
_.HEAD.NORM_LAST_LAYER = True  # freeze the prototypes' magnitude at 1
_.HEAD.POOL_HIDDEN = 128  # hidden units of the MIL attention

_.LOSS = Node()  # objective and temperatures
_.LOSS.OBJECTIVE = "cmd"  # dino | esvit | cmd | released | moco_v2 | lcr (losses/objective.py)
_.LOSS.STUDENT_TEMP = 0.1  # temperature of all student distributions
_.LOSS.WARMUP_TEACHER_TEMP = 0.04  # the teacher's temperature at the first epoch
_.LOSS.TEACHER_TEMP = 0.04  # and after the warm-up
_.LOSS.WARMUP_TEACHER_TEMP_EPOCHS = 0  # linear from the one to the other
_.LOSS.CENTER_MOMENTUM = 0.9  # of the EMA of the centres

_.CMD = Node()  # the inter-level terms; read by the objectives cmd and released (LAMBDA1)
_.CMD.LAMBDA1 = 0.3  # weight of L_S + L_T
_.CMD.LS = True  # whether L_S is on
_.CMD.LS_GRAD = "image"  # where L_S's gradient goes: image | both (image and bag)
_.CMD.LT = "residual"  # form of L_T: residual | diverse | contrast | cross | same | none
_.CMD.DIVERSE_K = 6  # bags in which a patch must recur, for LT residual and diverse
_.CMD.REGION_WEIGHT = "uniform"  # weights of patches in L_R: uniform | mix (half attention)

_.MOCO = Node()  # contrast with a queue of keys; read by the objectives moco_v2 and lcr
_.MOCO.QUEUE = 65536  # keys of other images that a query is compared with
_.MOCO.TEMPERATURE = 0.2  # of the similarities
_.MOCO.BN_IMAGES = 32  # images of a process that share BatchNorm's statistics; keys are shuffled
# among such groups

_.LCR = Node()  # the branch that is fitted to GradCAM; read by the objective lcr
_.LCR.CHANNELS = 32  # of its convolution
_.LCR.WEIGHT = 0.01  # of L_F, a sum over the images of a micro-batch on all processes
_.LCR.TEMPERATURE = 0.4  # of both maps' softmax

_.DATA = Node()  # the images
_.DATA.DATASET = "folder"  # a name in datasets/fine_grained.py
_.DATA.PATH = ""  # its folder; pretraining uses no labels
_.DATA.WORKERS = 8  # loader processes for each process of the run; 0: in that process
_.DATA.MAX_BAD = 0.01  # share of unreadable images that are skipped and listed; above it, stop
_.DATA.PARTIAL = False  # take a benchmark although not all its images are there
_.DATA.CACHE = "none"  # where all images are kept decoded: none (nowhere) | ram (this machine's
# memory) | device (each process's)
_.DATA.CACHE_SIZE = 288  # pixels of the shorter side to which images are reduced before crops are
# made of them on the device; 0: not at all
_.DATA.CROPS = "auto"  # who makes the crops: workers (of one image at a time) | device (of a batch
# at a time) | auto (device where images are kept, else workers)
_.DATA.DOWNLOAD = False  # let torchvision fetch a benchmark that is not there

_.AUG = Node()  # multi-crop augmentation (datasets/multicrop.py)
_.AUG.GLOBAL_CROPS_SIZE = 224  # pixels
_.AUG.GLOBAL_CROPS_SCALE = [0.4, 1.0]  # share of the image's area
_.AUG.LOCAL_CROPS_NUMBER = [8]  # one entry for each local size; [] for none
_.AUG.LOCAL_CROPS_SIZE = [96]  # pixels
_.AUG.LOCAL_CROPS_SCALE = [0.05, 0.4]  # share of the image's area
_.AUG.COLOR_JITTER = [0.4, 0.4, 0.2, 0.1]  # brightness, contrast, saturation, hue
_.AUG.COLOR_JITTER_PROB = 0.8  # how often a crop is jittered
_.AUG.GRAY_PROB = 0.2  # how often a crop loses its colour
_.AUG.BLUR_PROB = [1.0, 0.1, 0.5]  # first global crop, second, local crops
_.AUG.SOLARIZE_PROB = 0.2  # second global crop

_.TRAIN = Node()  # length, batch, optimizer
_.TRAIN.EPOCHS = 100  # length of the run; the schedules stretch to it
_.TRAIN.BATCH_SIZE_PER_GPU = 64  # images for each process and micro-batch
_.TRAIN.ACCUM_STEPS = 1  # micro-batches to an optimizer step
_.TRAIN.OPTIMIZER = "adamw"  # adamw | sgd (momentum 0.9)
_.TRAIN.BASE_LR = 0.0005  # at 256 images a step; the peak is BASE_LR * images / 256
_.TRAIN.MIN_LR = 1e-6  # at the end of the cosine
_.TRAIN.WARMUP_EPOCHS = 10  # linear, from 0
_.TRAIN.WEIGHT_DECAY = 0.04  # at the start; not on biases and 1-D parameters
_.TRAIN.WEIGHT_DECAY_END = 0.4  # at the end of its cosine
_.TRAIN.MOMENTUM_TEACHER = 0.996  # of the EMA at the start
_.TRAIN.MOMENTUM_TEACHER_END = 1.0  # at the end of its cosine
_.TRAIN.CLIP_GRAD = 3.0  # largest norm of each parameter's gradient on its own; 0: no clipping
_.TRAIN.FREEZE_LAST_LAYER = 1  # epochs in which the prototypes do not move
_.TRAIN.PRECISION = "auto"  # auto (bf16 on a GPU that has it, fp16 on another, fp32 on CPU) |
# fp32 | bf16 | fp16
_.TRAIN.COMPILE = False  # torch.compile of backbone and heads: minutes at the start, faster steps
_.TRAIN.CHECKPOINTING = False  # recompute blocks in the backward pass: less memory, more time
_.TRAIN.MAX_BAD_STEPS = 20  # skipped steps in a row (loss or gradient not finite) at which the run
# stops
_.TRAIN.DETERMINISTIC = False  # only operations that give the same bits every time: on GPUs slower,
# and an error where there is none
_.TRAIN.TIMEOUT_MINUTES = 30.0  # after which a process that waits for another gives up

_.INIT = Node()  # starting weights
_.INIT.WEIGHTS = ""  # someone's checkpoint to start student and teacher from, at epoch 0
_.INIT.CHECKPOINT_KEY = "teacher"  # which of its networks: teacher, student, or another name in it

_.CKPT = Node()  # checkpoints
_.CKPT.EVERY_EPOCHS = 1  # epochs between writings of the last checkpoint
_.CKPT.EVERY_STEPS = 0  # and steps between them, inside epochs too; 0: not by steps
_.CKPT.EVERY_MINUTES = 30.0  # and minutes between them; 0: not by the clock
_.CKPT.KEEP_EVERY = 20  # epochs between checkpoints that are kept for good; 0: only the last
_.CKPT.ON_ERROR = "stop"  # when a checkpoint or the log cannot be written: stop | go_on (and try
# again at the next one)

_.EVAL = Node()  # all evaluations, and the k-NN test during pretraining
_.EVAL.SIZE = 0  # pixels of the centre crop; 0: those of the checkpoint's global crops, else 224
_.EVAL.RESIZE = 0  # pixels of the shorter side before that crop; 0: 256/224 of EVAL.SIZE
_.EVAL.POOLING = "default"  # an image's feature: default (the backbone's) | mean (of its patch
# features) | mil (their mean weighted by the MIL attention) | lcr (by LCR's predicted map)
_.EVAL.BATCH_SIZE_PER_GPU = 128  # images for each process and forward; the linear probe's batch
_.EVAL.PRECISION = "fp32"  # of the frozen backbone: fp32 | bf16 | fp16 | auto (as in TRAIN)
_.EVAL.DUMP_FEATURES = ""  # folder to keep features in; those that fit are used again
_.EVAL.LOAD_FEATURES = ""  # folder of kept features that must be used; images are not read
_.EVAL.PICTURES = True  # PNGs beside the figures: classes, confusions, retrieved images, t-SNE
_.EVAL.SEEDS = 3  # of the linear probes in evaluate.py: SEED, SEED + 1, ...
_.EVAL.KNN_EVERY = 0  # epochs of pretraining between k-NN tests of the teacher; 0: none
_.EVAL.KNN_TRAIN = ""  # for these: folder with class subfolders, the gallery
_.EVAL.KNN_VAL = ""  # for these: folder with class subfolders, the queries
_.EVAL.KNN_K = 20  # for these: neighbours

_.KNN = Node()  # k-NN classification of the test split by the training split
_.KNN.KS = [10, 20, 100, 200]  # numbers of neighbours
_.KNN.TEMPERATURE = 0.07  # a neighbour's vote is exp(cosine / temperature)

_.RETRIEVAL = Node()  # nearest images by cosine
_.RETRIEVAL.SPLIT = "standard"  # standard (train is the gallery, test the queries) | ratio (every
# ninth test image is a query, all the rest the gallery)

_.LINEAR = Node()  # linear probe on frozen features
_.LINEAR.CLASSIFIER = "sgd"  # sgd (EsViT's recipe) | logistic (regression, by scikit-learn)
_.LINEAR.FEATURES = "augmented"  # augmented (a new crop every epoch) | cached (extracted once)
_.LINEAR.N_LAST_BLOCKS = 4  # blocks whose features are concatenated; pooling mean and mil use one
_.LINEAR.AVGPOOL_PATCHTOKENS = False  # append the mean of the last block's patches (ViT)
_.LINEAR.EPOCHS = 100  # of the SGD
_.LINEAR.BASE_LR = 0.001  # at 256 images a step; in proportion otherwise; a cosine to 0
_.LINEAR.SWEEP = []  # several base learning rates, trained side by side on one pass of features
_.LINEAR.C = [1.0]  # logistic regression's inverse regularisation; several are compared
_.LINEAR.HOLD_OUT = 0.1  # share of the training images that chooses among several SWEEP or C
_.LINEAR.VAL_FREQ = 1  # epochs between tests
_.LINEAR.LABEL_SHARES = [1.0]  # shares of the training labels to probe with, e.g. [0.1, 0.5, 1]
_.LINEAR.NUM_LABELS = 0  # outputs of the classifier; 0: as many as the data has classes

DEFAULTS = _

# Names of options in files of earlier versions, and what they are called now.
RENAMED = {"EVAL.MAX_BAD": "DATA.MAX_BAD"}

# Options, and whole sections, that may differ between a checkpoint and the command that resumes.
RESUME_MAY_DIFFER = (
    "OUTPUT_DIR",
    "DEVICE",
    "PRINT_FREQ",
    "RESUME",
    "DATA.PATH",
    "DATA.WORKERS",
    "DATA.MAX_BAD",
    "DATA.PARTIAL",
    "DATA.DOWNLOAD",
    "TRAIN.EPOCHS",
    "TRAIN.CHECKPOINTING",
    "TRAIN.MAX_BAD_STEPS",
    "TRAIN.DETERMINISTIC",
    "TRAIN.TIMEOUT_MINUTES",
    "TRAIN.BATCH_SIZE_PER_GPU",  # only their product with the processes counts: checked apart
    "TRAIN.ACCUM_STEPS",
    "INIT",
    "CKPT",
    "EVAL",
    "KNN",
    "RETRIEVAL",
    "LINEAR",
)

# Objectives that contrast a pair of crops; the others distil.
CONTRASTIVE = ("moco_v2", "lcr")

# Forms of L_T that compare the images of a batch.
COMPARING = ("residual", "diverse", "contrast")

# The values of options that are names.
CHOICES = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "RESUME": ("auto", "force"),
    "LOSS.OBJECTIVE": ("dino", "esvit", "cmd", "released", *CONTRASTIVE),
    "CMD.LS_GRAD": ("image", "both"),
    "CMD.LT": ("residual", "diverse", "contrast", "cross", "same", "none"),
    "CMD.REGION_WEIGHT": ("uniform", "mix"),
    "DATA.CACHE": ("none", "ram", "device"),
    "DATA.CROPS": ("auto", "workers", "device"),
    "CKPT.ON_ERROR": ("stop", "go_on"),
    "TRAIN.OPTIMIZER": ("adamw", "sgd"),
    "TRAIN.PRECISION": ("auto", "fp32", "bf16", "fp16"),
    "EVAL.POOLING": ("default", "mean", "mil", "lcr"),
    "EVAL.PRECISION": ("auto", "fp32", "bf16", "fp16"),
    "RETRIEVAL.SPLIT": ("standard", "ratio"),
    "LINEAR.CLASSIFIER": ("sgd", "logistic"),
    "LINEAR.FEATURES": ("augmented", "cached"),
}

# key: (lowest, highest); None for no bound. A list's entries are bound one by one. Where memory or
# time is the real limit, the highest is far beyond what is sensible, and a sentence instead of a
# crash.
RANGES = {
    "SEED": (0, None),
    "PRINT_FREQ": (1, None),
    "MODEL.EMBED_DIM": (0, 2**16),
    "MODEL.DEPTHS": (1, 1000),
    "MODEL.NUM_HEADS": (1, 2**10),
    "MODEL.WINDOW_SIZE": (1, 2**10),
    "MODEL.PATCH_SIZE": (0, 2**12),
    "MODEL.IMG_SIZE": (1, 2**12),
    "MODEL.DROP_PATH": (0, 0.999),
    "MODEL.NUM_CLASSES": (0, 0),
    "HEAD.OUT_DIM": (2, 2**24),
    "HEAD.HIDDEN_DIM": (1, 2**16),
    "HEAD.BOTTLENECK_DIM": (1, 2**16),
    "HEAD.LAYERS": (1, 100),
    "HEAD.POOL_HIDDEN": (1, 2**16),
    "LOSS.STUDENT_TEMP": (1e-4, None),
    "LOSS.WARMUP_TEACHER_TEMP": (1e-4, None),
    "LOSS.TEACHER_TEMP": (1e-4, None),
    "LOSS.WARMUP_TEACHER_TEMP_EPOCHS": (0, None),
    "LOSS.CENTER_MOMENTUM": (0, 1),
    "CMD.LAMBDA1": (0, None),
    "CMD.DIVERSE_K": (1, None),
    "MOCO.QUEUE": (1, 2**24),
    "MOCO.TEMPERATURE": (1e-4, None),
    "MOCO.BN_IMAGES": (2, None),
    "LCR.CHANNELS": (1, 2**16),
    "LCR.WEIGHT": (0, None),
    "LCR.TEMPERATURE": (1e-4, None),
    "DATA.WORKERS": (0, None),
    "DATA.MAX_BAD": (0, 1),
    "DATA.CACHE_SIZE": (0, None),
    "AUG.GLOBAL_CROPS_SIZE": (1, 2**12),
    "AUG.LOCAL_CROPS_NUMBER": (0, 100),
    "AUG.LOCAL_CROPS_SIZE": (None, 2**12),
    "AUG.COLOR_JITTER_PROB": (0, 1),
    "AUG.GRAY_PROB": (0, 1),
    "AUG.SOLARIZE_PROB": (0, 1),
    "TRAIN.EPOCHS": (1, 10**6),
    "TRAIN.BATCH_SIZE_PER_GPU": (1, None),
    "TRAIN.ACCUM_STEPS": (1, None),
    "TRAIN.BASE_LR": (0, None),
    "TRAIN.MIN_LR": (0, None),
    "TRAIN.WARMUP_EPOCHS": (0, None),
    "TRAIN.WEIGHT_DECAY": (0, None),
    "TRAIN.WEIGHT_DECAY_END": (0, None),
    "TRAIN.MOMENTUM_TEACHER": (0, 1),
    "TRAIN.MOMENTUM_TEACHER_END": (0, 1),
    "TRAIN.CLIP_GRAD": (0, None),
    "TRAIN.FREEZE_LAST_LAYER": (0, None),
    "TRAIN.MAX_BAD_STEPS": (1, None),
    "TRAIN.TIMEOUT_MINUTES": (0.01, 10**5),
    "CKPT.EVERY_EPOCHS": (1, None),
    "CKPT.EVERY_STEPS": (0, None),
    "CKPT.EVERY_MINUTES": (0, None),
    "CKPT.KEEP_EVERY": (0, None),
    "EVAL.KNN_EVERY": (0, None),
    "EVAL.KNN_K": (1, None),
    "EVAL.SIZE": (0, None),
    "EVAL.RESIZE": (0, None),
    "EVAL.BATCH_SIZE_PER_GPU": (1, None),
    "EVAL.SEEDS": (1, None),
    "KNN.KS": (1, None),
    "KNN.TEMPERATURE": (1e-4, None),
    "LINEAR.N_LAST_BLOCKS": (1, None),
    "LINEAR.EPOCHS": (1, 10**6),
    "LINEAR.BASE_LR": (0, None),
    "LINEAR.SWEEP": (0, None),
    "LINEAR.C": (1e-9, None),
    "LINEAR.HOLD_OUT": (0.01, 0.9),
    "LINEAR.VAL_FREQ": (1, None),
    "LINEAR.LABEL_SHARES": (1e-6, 1),
    "LINEAR.NUM_LABELS": (0, None),
}

# Options that name files or folders: ~ is the user's home in them.
PATHS = (
    "OUTPUT_DIR",
    "DATA.PATH",
    "INIT.WEIGHTS",
    "EVAL.DUMP_FEATURES",
    "EVAL.LOAD_FEATURES",
    "EVAL.KNN_TRAIN",
    "EVAL.KNN_VAL",
)
