#pragma once
#include "spike_conv/cpu_pass.h"
#include "spike_conv/cpu_words.h"
