#include "cpu/amx.h"
#include "spike_conv/cpu_tiles_forward.h"
#include "spike_conv/cpu_tiles_input_grad.h"
#include "spike_conv/cpu_tiles_weight_grad.h"

namespace trtkern {

extern const SpikePlanner kTilesForward = amx::tiles_forward, kTilesWeightGrad = amx::tiles_weight_grad,
                          kTilesInputGrad = amx::tiles_input_grad;

}  // namespace trtkern
