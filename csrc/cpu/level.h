// The kernels for one instruction set: included once per level_*.cpp, inside that level's namespace.
#include "simd.h"

#include "match.h"

#include "rows.h"

#include "finish.h"

#include "block.h"

#include "amend.h"

#include "complete.h"

#define MAC_STRING_(x) #x
#define MAC_STRING(x) MAC_STRING_(x)
const Kernels table = {MAC_STRING(MAC_LEVEL_NAME), kLanes, match, amend, complete};
