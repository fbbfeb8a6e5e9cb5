#define LEAPALIGN_ISA scalar
#include "vectors/vector_scalar.h"

#include "vectors/table.h"
