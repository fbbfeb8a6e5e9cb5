#define LEAPALIGN_ISA scalar
#include "vector_scalar.h"

#include "table.h"
