#include "cpu/amx.h"
#include "recurrent/cpu_tiles.h"

namespace trtkern {

extern const RecurrentProduct kRecurrentTiles = {amx::tiles_bytes, amx::tiles_own, amx::tiles_items, amx::lay_tiles,
                                                 amx::multiply_tiles};

}  // namespace trtkern
