// All that a library is compiled from that is made at first use, for one neuron and one instruction set
// (trtkern/backends/_compiled.py): the rows of that neuron, which trtkern_neurons.h then has alone. The translation
// unit includes the header of its instruction set (cpu/avx512.h, ...) before.
#pragma once
#include "cpu/isa.h"
#include "cpu/own.h"
#include "lif/cpu_forward.h"
#include "lif/cpu_backward.h"
#include "recurrent/cpu_scratch.h"

extern "C" __attribute__((visibility("default"))) const trtkern::OwnRows trtkern_own_rows = {
    .size = sizeof(trtkern::OwnRows),
    .args = sizeof(trtkern::LifArgs),
    .forward_scratch = trtkern::kForwardScratch,
    .backward_scratch = trtkern::kBackwardScratch,
    .lif_forward = trtkern::TK_ISA::lif_forward,
    .lif_backward = trtkern::TK_ISA::lif_backward,
    .recurrent_args = sizeof(trtkern::RecurrentArgs),
    .recurrent_own = trtkern::TK_ISA::recurrent_own,
    .recurrent_forward = trtkern::TK_ISA::recurrent_forward,
    .recurrent_backward = trtkern::TK_ISA::recurrent_backward,
};
